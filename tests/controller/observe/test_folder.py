"""The run's folder: nothing is overwritten, nothing is counted twice, a crash costs one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.configs.errors import CheckpointError, UserError
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import JsonLines, read_json, read_lines, write_json
from paceline.controller.observe.files.recorder import read_records
from paceline.controller.observe.files.records import EvaluationRecord, StepRecord
from paceline.controller.observe.files.versions import collect_versions, command_line

WriteRun = Callable[..., RunFolder]


def test_a_fresh_run_is_refused_where_another_one_lies(tmp_path: Path) -> None:
    root = tmp_path / "run"
    RunFolder.create(root).write_config("name: run\n")
    with pytest.raises(UserError, match="--resume") as raised:
        RunFolder.create(root)
    assert "\n" not in str(raised.value)


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path).root == tmp_path


def test_a_file_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "run")


def test_resuming_what_does_not_exist_is_a_one_line_error(tmp_path: Path) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError) as raised:
            RunFolder.open(root)
        assert "\n" not in str(raised.value)


def test_a_torn_last_line_is_counted_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    assert read_lines(path) == ([{"step": 1}, {"step": 2}], 1)


def test_lines_written_after_a_torn_one_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"st')
    with JsonLines(path) as lines:
        lines.append({"step": 2})
    assert read_lines(path) == ([{"step": 1}, {"step": 2}], 1)


def test_a_written_line_is_readable_at_once(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "lines.jsonl") as lines:
        lines.append({"step": 1, "loss": math.nan})
        assert read_lines(tmp_path / "lines.jsonl") == ([{"step": 1, "loss": None}], 0)


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})
    with pytest.raises(TypeError):
        write_json(path, {"steps": object()})
    assert read_json(path) == {"steps": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_rewinding_keeps_every_step_once_and_discards_the_later_ones(
    synthetic_run: WriteRun,
) -> None:
    folder = synthetic_run(train_steps=90, finished=False)
    before = read_records(folder)
    seconds = folder.rewind("train", 50)
    records = read_records(folder)
    steps = [r for r in records if isinstance(r, StepRecord) and r.phase == "train"]
    evaluations = [r for r in records if isinstance(r, EvaluationRecord)]
    assert [r.step for r in steps] == list(range(1, 51))
    assert max(r.step for r in evaluations if r.phase == "train") == 40
    assert sum(r.phase == "warm_start" for r in records) == sum(
        r.phase == "warm_start" for r in before
    )
    assert seconds == max(r.seconds for r in records)
    discarded, _ = read_lines(folder.discarded_metrics)
    assert len(discarded) + len(records) == len(before)
    assert all(line["step"] <= 50 for line in read_lines(folder.samples)[0])


def test_rewinding_twice_changes_nothing_more(synthetic_run: WriteRun) -> None:
    folder = synthetic_run(train_steps=60, finished=False)
    assert folder.rewind("train", 30) == folder.rewind("train", 30)
    discarded, _ = read_lines(folder.discarded_metrics)
    assert [line["step"] for line in discarded if line["phase"] == "train"] == list(range(31, 61))


def test_rewinding_into_the_warm_start_forgets_all_training(synthetic_run: WriteRun) -> None:
    folder = synthetic_run(train_steps=20, finished=False)
    folder.rewind("warm_start", 100)
    records = read_records(folder)
    assert {r.phase for r in records} == {"warm_start"}
    assert max(r.step for r in records) == 100


def test_rewinding_repairs_a_torn_line(synthetic_run: WriteRun) -> None:
    folder = synthetic_run(train_steps=20, finished=False)
    with folder.metrics.open("a") as file:
        file.write('{"phase": "train", "st')
    folder.rewind("train", 20)
    assert read_lines(folder.metrics)[1] == 0


def test_the_versions_of_the_first_start_are_kept(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write_versions({"seed": 1})
    folder.write_versions({"seed": 1, "python": "3.12"})
    assert read_json(folder.versions) == {
        "seed": 1,
        "resumed_with": [{"seed": 1, "python": "3.12"}],
    }


def test_versions_say_what_a_rerun_needs() -> None:
    versions = collect_versions(7, ["/usr/local/bin/paceline", "train", "my run.yaml"])
    assert json.loads(json.dumps(versions)) == versions
    assert versions["seed"] == 7
    assert versions["command"] == "paceline train 'my run.yaml'"
    assert {"paceline", "torch", "ray", "transformers", "numpy"} <= set(versions["packages"])
    assert versions["cpu"]["usable"] >= 1


def test_a_command_without_arguments_is_still_a_command() -> None:
    assert command_line([]) == "paceline"
