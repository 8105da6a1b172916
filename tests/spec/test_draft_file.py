"""Draft texts come back as they were packed; a damaged file is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.errors import CheckpointError
from paceline.configs.packed_arrays import pack_arrays
from paceline.configs.vocabulary import DraftText
from paceline.spec.draft_file import load_draft_texts, pack, save_draft_texts, unpack

Known = tuple[tuple[int, ...], int, list[int]]
SOME: list[Known] = [
    ((1, 2), 3, [1, 2, 3]),
    ((1, 2), 3, [1, 2, 4]),
    ((), -1, [7] * 50),
    ((9,), 2, [-5, 6]),
    ((9,), 2, []),
]

tokens = st.integers(-(2**31), 2**31 - 1)


def texts(known: list[Known]) -> list[DraftText]:
    return [
        DraftText(prompt, version, np.array(tokens, dtype=np.int32))
        for prompt, version, tokens in known
    ]


def contents(found: list[DraftText]) -> list[Known]:
    return [(text.prompt_token_ids, text.version, text.token_ids.tolist()) for text in found]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_draft_texts(texts(SOME), tmp_path / "draft_texts")
    return tmp_path / "draft_texts"


@given(
    st.lists(
        st.tuples(
            st.lists(tokens, max_size=3).map(tuple),
            st.integers(-(2**63), 2**63 - 1),
            st.lists(tokens, max_size=5),
        ),
        max_size=6,
    )
)
def test_what_was_packed_is_unpacked(known: list[Known]) -> None:
    assert contents(unpack(pack(texts(known)), "a test")) == known


@given(st.lists(st.sampled_from(SOME), max_size=4))
def test_what_was_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, known: list[Known]
) -> None:
    path = tmp_path_factory.mktemp("saved") / "draft_texts"
    save_draft_texts(texts(known), path)
    found = load_draft_texts(path)
    assert contents(found) == known
    assert all(text.token_ids.dtype == np.int32 for text in found)
    assert [file.name for file in path.parent.iterdir()] == ["draft_texts"]


def test_a_token_costs_four_bytes_and_a_prompt_is_written_once() -> None:
    prompt = tuple(range(1000))
    size = len(pack(texts([(prompt, 0, [1] * 500)] * 100)))
    assert size < 4 * (1000 + 100 * 500) + 100 * 16 + 600


def test_any_changed_byte_is_noticed() -> None:
    whole = pack(texts(SOME))
    for at in range(len(whole)):
        with pytest.raises(CheckpointError) as refused:
            unpack(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], "there")
        assert "\n" not in str(refused.value)
        assert "there" in str(refused.value)


def test_any_cut_and_anything_appended_is_noticed() -> None:
    whole = pack(texts(SOME))
    for damaged in [whole[:size] for size in range(len(whole))] + [whole + b"\0"]:
        with pytest.raises(CheckpointError, match="no whole saved draft texts"):
            unpack(damaged, "there")


def test_a_missing_file_and_another_format_say_what_to_do(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file.*starts cold"):
        load_draft_texts(tmp_path / "nowhere")
    saved.write_bytes(pack_arrays("paceline draft texts 0", {}, {}))
    with pytest.raises(CheckpointError, match="format 'paceline draft texts 0', expected"):
        load_draft_texts(saved)


def test_a_save_that_fails_leaves_the_last_one(saved: Path) -> None:
    before = saved.read_bytes()
    (saved.parent / "draft_texts.tmp").mkdir()
    with pytest.raises(OSError, match="directory"):
        save_draft_texts([], saved)
    assert saved.read_bytes() == before
