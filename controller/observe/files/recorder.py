"""Where the loop reports to: each record goes to the run's files, TensorBoard and the view."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import JsonLines, read_lines
from paceline.controller.observe.files.records import (
    STEP_MAPPINGS,
    STEP_NUMBERS,
    EvaluationRecord,
    Phase,
    SampleRecord,
    StepRecord,
)
from paceline.controller.observe.view.lines import evaluation_line
from paceline.controller.observe.view.text import is_number, printable
from paceline.controller.observe.view.view import View


class Recorder(Protocol):
    """A receiver of what the loop tells about itself. Methods are called from one thread."""

    def step(self, record: StepRecord) -> None:
        """Take note of a finished step."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """Take note of a finished evaluation."""

    def samples(self, records: Sequence[SampleRecord]) -> None:
        """Take note of rollouts that are worth keeping."""

    def workers(self, states: Mapping[str, str]) -> None:
        """Take note of what each worker is doing, by its name; all workers at once."""

    def message(self, text: str) -> None:
        """Say what the run is doing now, or something that happened."""


class RunRecorder:
    """Writes records into the run's folder and shows them.

    Use it as a context manager: entering starts the view, leaving (an error and Ctrl-C too) gives
    the terminal back and closes the files. On a folder that already has metrics, the view first
    learns what the run had done before; call ``RunFolder.rewind`` ahead of it.
    """

    def __init__(self, folder: RunFolder, view: View, tensorboard: bool) -> None:
        self._view = view
        records = read_records(folder)
        view.replay(records)
        self._metrics = JsonLines(folder.metrics)
        self._samples = JsonLines(folder.samples)
        # Line-buffered appends: other libraries' output may go to the same file.
        self._log = folder.log.open("a", encoding="utf-8", errors="replace", buffering=1)
        self._events = (
            _EventFiles(folder.tensorboard, _last_steps(records)) if tensorboard else None
        )
        self._closed = False

    def __enter__(self) -> Self:
        self._view.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def step(self, record: StepRecord) -> None:
        """Take note of a finished step."""
        self._metrics.append(record.as_dict())
        if self._events:
            self._events.step(record)
        self._view.step(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Take note of a finished evaluation."""
        self._metrics.append(record.as_dict())
        self._write_log(evaluation_line(record))
        if self._events:
            self._events.evaluation(record)
        self._view.evaluation(record)

    def samples(self, records: Sequence[SampleRecord]) -> None:
        """Take note of rollouts that are worth keeping."""
        for record in records:
            self._samples.append(record.as_dict())
        self._view.samples(records)

    def workers(self, states: Mapping[str, str]) -> None:
        """Take note of what each worker is doing, by its name; all workers at once."""
        self._view.workers(states)

    def message(self, text: str) -> None:
        """Say what the run is doing now, or something that happened."""
        self._write_log(text)
        self._view.message(text)

    def close(self) -> None:
        """Give the terminal back and close the files; closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        try:
            self._view.close()
        finally:
            self._metrics.close()
            self._samples.close()
            self._log.close()
            if self._events:
                self._events.close()

    def _write_log(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._log.write(f"{stamp} {printable(text)}\n")


class _MessageHandler(logging.Handler):
    """Makes messages of what is logged."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def emit(self, record: logging.LogRecord) -> None:
        self._recorder.message(record.getMessage())


@contextmanager
def log_to(recorder: Recorder) -> Iterator[None]:
    """Show what Paceline logs (a worker died, a group was dropped) as messages of the run."""
    logger, handler = logging.getLogger("paceline"), _MessageHandler(recorder)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def read_records(folder: RunFolder) -> list[StepRecord | EvaluationRecord]:
    """Return the records of ``metrics.jsonl`` in order; lines that are none are passed over."""
    lines, _ = read_lines(folder.metrics)
    records = (StepRecord.from_dict(line) or EvaluationRecord.from_dict(line) for line in lines)
    return [record for record in records if record is not None]


class _EventFiles:
    """TensorBoard event files, a folder a phase: each phase counts its own steps."""

    def __init__(self, root: Path, last_steps: Mapping[Phase, int]) -> None:
        self._root = root
        self._last_steps = last_steps
        self._writers: dict[Phase, Any] = {}

    def step(self, record: StepRecord) -> None:
        """Write the step's numbers."""
        values = {name: getattr(record, name) for name in STEP_NUMBERS}
        for group in STEP_MAPPINGS:
            values |= {f"{group}/{name}": v for name, v in getattr(record, group).items()}
        self._write(record.phase, record.step, values)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Write the accuracies."""
        values = {"held_out/greedy": record.greedy, "held_out/sampled": record.sampled}
        self._write(record.phase, record.step, values)

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()

    def _write(self, phase: Phase, step: int, values: Mapping[str, float | None]) -> None:
        writer = self._writer(phase)
        for name, value in values.items():
            if is_number(value):
                writer.add_scalar(name, value, step)

    def _writer(self, phase: Phase) -> Any:
        if phase not in self._writers:
            # Imported late: it imports torch, which `paceline report` has no need of.
            from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

            # What an interrupted run had written after the step it is resumed from is purged.
            first_step = self._last_steps.get(phase, -1) + 1
            self._writers[phase] = SummaryWriter(
                str(self._root / phase), purge_step=first_step, flush_secs=10
            )
        return self._writers[phase]


def _last_steps(records: Sequence[StepRecord | EvaluationRecord]) -> dict[Phase, int]:
    """Return the last recorded step of each phase."""
    last: dict[Phase, int] = {}
    for record in records:
        last[record.phase] = max(record.step, last.get(record.phase, 0))
    return last
