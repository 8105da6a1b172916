"""A saved history drafts as the one it was saved from; a damaged file is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.configs.errors import CheckpointError
from paceline.spec.history import History
from paceline.spec.history_file import load_history, save_history

ONE_HISTORY = {("Größe?", 3): [[1, 2, 3], [1, 2, 4]], ("", -1): [[7] * 50], ("b", 2): [[-5, 6]]}


def filled(contents: dict[tuple[str, int], list[list[int]]], window: int = 16) -> History:
    history = History(window=window)
    for (problem, generation), sequences in contents.items():
        for sequence in sequences:
            history.add(problem, generation, sequence)
    return history


def contents(history: History) -> dict[tuple[str, int], list[list[int]]]:
    return {
        (each.problem, each.generation): sorted(
            text.tolist() for text in history.sequences(each.problem, each.generation)
        )
        for each in history.summaries()
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_history(filled(ONE_HISTORY), tmp_path / "history")
    return tmp_path / "history"


@settings(deadline=None)  # it waits for the disk
@given(
    st.dictionaries(
        st.tuples(st.text(max_size=3), st.integers(-(2**63), 2**63 - 1)),
        st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1), min_size=1, max_size=3),
        max_size=4,
    )
)
def test_what_was_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, known: dict[tuple[str, int], list[list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("saved") / "history"
    history = filled(known)
    save_history(history, path)
    loaded = History()
    load_history(path, loaded)
    assert contents(loaded) == contents(history) == {k: sorted(v) for k, v in known.items()}
    assert loaded.num_tokens == history.num_tokens
    assert [file.name for file in path.parent.iterdir()] == ["history"]


def test_a_loaded_history_drafts_like_the_saved_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    history = History(window=3)
    for generation in range(3):
        for sequence in random.integers(0, 6, (5, 200), np.int32):
            history.add("p", generation, sequence)
    history.extend("p", 2, "open", random.integers(0, 6, 100, np.int32))
    save_history(history, tmp_path / "history")
    loaded = History(window=3)
    load_history(tmp_path / "history", loaded)
    context = random.integers(0, 6, 300, np.int32)
    drafts = []
    for each in (history, loaded):
        reader = each.reader()
        request = reader.open("p")
        drafts.append([reader.propose([request], [[token]], 6) for token in context])
    for before, after in zip(*drafts, strict=True):
        assert before.of(0) == after.of(0)
        assert np.array_equal(before.probabilities, after.probabilities)


def test_a_smaller_window_keeps_the_newest(tmp_path: Path) -> None:
    save_history(filled({("p", n): [[n, n]] for n in range(5)}), tmp_path / "history")
    loaded = History(window=2)
    load_history(tmp_path / "history", loaded)
    assert set(contents(loaded)) == {("p", 3), ("p", 4)}


def test_any_changed_byte_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    for at in range(len(whole)):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        loaded = History()
        with pytest.raises(CheckpointError) as refused:
            load_history(saved, loaded)
        assert "\n" not in str(refused.value)
        assert str(saved) in str(refused.value)
        assert loaded.num_tokens == 0


def test_any_cut_and_anything_appended_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    for damaged in [whole[:size] for size in range(len(whole))] + [whole + b"\0"]:
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is no whole saved history"):
            load_history(saved, History())


def test_a_missing_file_and_another_format_say_what_to_do(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file.*starts cold"):
        load_history(tmp_path / "nowhere", History())
    saved.write_bytes(saved.read_bytes().replace(b"history 1", b"history 2"))
    with pytest.raises(CheckpointError, match="format 'paceline history 2', expected"):
        load_history(saved, History())


def test_a_save_that_fails_leaves_the_last_one(saved: Path) -> None:
    before = saved.read_bytes()
    (saved.parent / "history.tmp").mkdir()
    with pytest.raises(OSError, match="directory"):
        save_history(History(), saved)
    assert saved.read_bytes() == before
