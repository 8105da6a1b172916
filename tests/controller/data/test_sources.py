from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.configs.errors import ConfigError, DataError
from paceline.configs.schema.data import DatasetSource
from paceline.controller.data.feed import PromptSet
from paceline.controller.data.rendering import PromptRenderer
from paceline.controller.data.sources import DatasetPromptSource, load_imported_source
from paceline.controller.data.tokenizer import characters_tokenizer


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"{n}+1", "answer": f"easy #### {n + 1}", "level": n} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(path: Path | str, seed: int = 0, **keys: object) -> DatasetPromptSource:
    config = DatasetSource.model_validate({"type": "dataset", "path": str(path), **keys})
    return DatasetPromptSource(config, config.split, seed)


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own(sums: Path) -> None:
    rows = source(sums)
    assert rows.num_records == 20
    epochs = [
        [rows.record(20 * epoch + i).fields["question"] for i in range(20)] for epoch in range(3)
    ]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == 20
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_index_means_the_same_row_in_every_process_whatever_was_read_before(sums: Path) -> None:
    forward, backward = source(sums), source(sums)
    expected = [forward.record(i) for i in range(50)]
    assert [backward.record(i) for i in reversed(range(50))] == expected[::-1]
    assert [source(sums, seed=1).record(i).id for i in range(20)] != [r.id for r in expected[:20]]


def test_the_reference_is_what_the_pattern_finds_and_the_answer_the_whole_column(
    sums: Path,
) -> None:
    record = source(sums, answer_pattern=r"####\s*(.+)").record(0)
    number = record.fields["level"] + 1
    assert record.reference == str(number)
    assert record.fields["answer"] == f"easy #### {number}"


def test_columns_may_have_other_names_and_csv_numbers_become_text(tmp_path: Path) -> None:
    path = tmp_path / "capitals.csv"
    path.write_text("country,population\nFrance,68\n")
    record = source(path, question_field="country", answer_field="population").record(0)
    assert (record.fields["question"], record.reference) == ("France", "68")


def test_an_empty_answer_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": null}\n{"question": "b", "answer": "c"}\n')
    records = {record.id: record for record in map(source(path).record, range(2))}
    assert records["rows.jsonl/train/0"].reference is None
    assert "answer" not in records["rows.jsonl/train/0"].fields


def test_folders_and_their_splits_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"question": split, "answer": "x"}))
    assert source(folder).record(0).fields["question"] == "train"
    assert source(folder, split="test").record(0).fields["question"] == "test"


def test_a_dataset_feeds_prompts_that_were_not_held_out(sums: Path) -> None:
    renderer = PromptRenderer(
        DatasetSource(type="dataset", path=str(sums)), characters_tokenizer(), 16, 8
    )
    prompts = PromptSet(source(sums), renderer, num_held_out=5)
    feed = prompts.feed()
    fed = {next(feed)[1].text for _ in range(100)}
    assert len(fed) == 15
    assert not fed & {prompt.text for prompt in prompts.held_out}


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"path": "nowhere.jsonl"}, DataError, "no such file or folder"),
        ({"path": "/nowhere/data"}, DataError, "no such file or folder"),
        ({"path": "notes.txt"}, DataError, "expected one of .json, .jsonl, .csv, .parquet"),
        ({"path": "broken.jsonl"}, DataError, "cannot be read"),
        ({"path": "header.csv"}, DataError, "has no rows|cannot be read"),
        ({"split": "test"}, DataError, "split test, cannot be read .*Unknown split"),
        ({"question_field": "problem"}, ConfigError, "question_field: .* no column 'problem'; it"),
        ({"answer_field": "gold"}, ConfigError, "answer_field: .* no column 'gold'"),
        ({"answer_pattern": "(("}, ConfigError, "answer_pattern: .* is not a pattern"),
        ({"answer_pattern": "####"}, ConfigError, "answer_pattern: .* has no group"),
        ({"answer_pattern": "= (.+)"}, DataError, "record sums.jsonl/train/.* finds nothing in"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_named_in_one_line(
    keys: dict[str, str],
    error: type[Exception],
    message: str,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.jsonl").write_text("{not json")
    (tmp_path / "header.csv").write_text("question,answer\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as caught:
        source(**{"path": str(sums), **keys}).record(0)
    assert "\n" not in str(caught.value)


def test_a_users_source_is_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "riddles_of_mine.py").write_text(
        "from paceline.configs.vocabulary import Record\n"
        "class Riddles:\n"
        "    num_records = None\n"
        "    def __init__(self, greeting):\n"
        "        self.greeting = greeting\n"
        "    def record(self, index):\n"
        "        return Record(str(index), {'question': f'{self.greeting} {index}'})\n"
        "class Countless:\n"
        "    def record(self, index):\n"
        "        return None\n"
    )
    monkeypatch.chdir(tmp_path)
    riddles = load_imported_source("riddles_of_mine:Riddles", {"greeting": "hello"})
    assert riddles.record(3).fields["question"] == "hello 3"
    with pytest.raises(ConfigError, match="must have an attribute num_records"):
        load_imported_source("riddles_of_mine:Countless", {})
    with pytest.raises(ConfigError, match="raised TypeError"):
        load_imported_source("riddles_of_mine:Riddles", {"salute": "hello"})
