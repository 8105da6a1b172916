"""Every record reaches every place it belongs to, and leaving always closes everything."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import read_lines
from paceline.controller.observe.files.recorder import RunRecorder, log_to, read_records
from paceline.controller.observe.files.records import EvaluationRecord, SampleRecord, StepRecord

STEP = StepRecord("train", 1, 0.6, reward=0.25, metrics={"entropy": 0.5}, time={"train": 0.3})
EVALUATION = EvaluationRecord.measured("before", 0, 0.2, 0.4, 0.2, 256)
SAMPLE = SampleRecord(1, "ab=", "ba", 1.0, "ba", (0,), 0)


class SpyView:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def start(self) -> None:
        self.events.append("start")

    def step(self, record: StepRecord) -> None:
        self.events.append(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        self.events.append(record)

    def samples(self, records: Sequence[SampleRecord]) -> None:
        self.events.extend(records)

    def workers(self, states: Mapping[str, str]) -> None:
        self.events.append(states)

    def message(self, text: str) -> None:
        self.events.append(text)

    def replay(self, records: Sequence[StepRecord | EvaluationRecord]) -> None:
        self.events.append(list(records))

    def close(self) -> None:
        self.events.append("close")


def test_a_record_goes_to_its_file_to_the_log_and_to_the_view(tmp_path: Path) -> None:
    folder, view = RunFolder.create(tmp_path / "run"), SpyView()
    with RunRecorder(folder, view, tensorboard=False) as recorder:
        recorder.message("measuring")
        recorder.evaluation(EVALUATION)
        recorder.workers({"rollout-0": "ready"})
        recorder.step(STEP)
        recorder.samples([SAMPLE])
        assert read_records(folder) == [EVALUATION, STEP]
    assert read_lines(folder.samples) == ([SAMPLE.as_dict()], 0)
    log = folder.log.read_text()
    assert "measuring" in log
    assert "greedy 40.0%" in log
    assert view.events == [
        [], "start", "measuring", EVALUATION, {"rollout-0": "ready"}, STEP, SAMPLE, "close",
    ]  # fmt: skip


def test_an_error_closes_the_view_and_passes_through(tmp_path: Path) -> None:
    view = SpyView()
    with (
        pytest.raises(RuntimeError, match="the cause"),
        RunRecorder(RunFolder.create(tmp_path / "run"), view, tensorboard=False),
    ):
        raise RuntimeError("the cause")
    assert view.events[-1] == "close"


def test_closing_twice_closes_once(tmp_path: Path) -> None:
    view = SpyView()
    with RunRecorder(RunFolder.create(tmp_path / "run"), view, tensorboard=False) as recorder:
        recorder.close()
    assert view.events.count("close") == 1


def test_what_rooms_log_is_shown_as_messages_and_not_on_standard_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, view = RunFolder.create(tmp_path / "run"), SpyView()
    logger = logging.getLogger("paceline.controller.engines.pool")
    with RunRecorder(folder, view, tensorboard=False) as recorder:
        with log_to(recorder):
            logger.warning("worker %d died", 3)
        logger.warning("after the run")
    assert "worker 3 died" in view.events
    assert "after the run" not in view.events
    assert "worker 3 died" in folder.log.read_text()
    assert "worker 3 died" not in capfd.readouterr().err


def test_a_resumed_run_shows_what_went_before_and_continues_its_curve(
    synthetic_run: Callable[..., RunFolder],
) -> None:
    folder, view = synthetic_run(train_steps=30, finished=False), SpyView()
    folder.rewind("train", 20)
    before = read_records(folder)
    with RunRecorder(folder, view, tensorboard=False) as recorder:
        recorder.step(StepRecord("train", 21, 99.0))
    assert view.events[0] == before
    train = [
        r.step for r in read_records(folder) if isinstance(r, StepRecord) and r.phase == "train"
    ]
    assert train == list(range(1, 22))


def test_tensorboard_keeps_the_phases_apart(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with RunRecorder(folder, SpyView(), tensorboard=True) as recorder:
        recorder.step(StepRecord("warm_start", 1, 0.1, loss=3.0))
        recorder.evaluation(EVALUATION)
        recorder.step(STEP)
    written = {
        phase: b"".join(file.read_bytes() for file in (folder.tensorboard / phase).iterdir())
        for phase in ("warm_start", "train")
    }
    assert b"loss" in written["warm_start"]
    assert b"reward" not in written["warm_start"]
    for tag in (b"reward", b"metrics/entropy", b"time/train", b"held_out/greedy"):
        assert tag in written["train"]
