"""What a run shows while it works: a live view on a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console, RenderableType
from rich.live import Live

from paceline.controller.observe.files.records import EvaluationRecord, SampleRecord, StepRecord
from paceline.controller.observe.view.lines import evaluation_line, step_line
from paceline.controller.observe.view.panel import run_panel
from paceline.controller.observe.view.state import RunPlan, ViewState
from paceline.controller.observe.view.terminal import is_terminal, reserved_terminal
from paceline.controller.observe.view.text import printable

REFRESHES_PER_SECOND = 4


class View(Protocol):
    """A receiver of records that shows them; started once, closed once, which frees the screen."""

    def start(self) -> None:
        """Begin to show."""

    def step(self, record: StepRecord) -> None:
        """Show a finished step."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """Show a finished evaluation."""

    def samples(self, records: Sequence[SampleRecord]) -> None:
        """Show rollouts."""

    def workers(self, states: Mapping[str, str]) -> None:
        """Show what each worker is doing."""

    def message(self, text: str) -> None:
        """Show what the run is doing now, or something that happened."""

    def replay(self, records: Sequence[StepRecord | EvaluationRecord]) -> None:
        """Learn what a resumed run had done before, without showing it line by line."""

    def close(self) -> None:
        """Stop showing; closing twice is harmless."""


def open_view(plan: RunPlan, live: bool, log: Path, stream: TextIO | None = None) -> View:
    """Return a live view where ``live`` is set and the stream is a terminal, else plain lines.

    While a live view is shown, everything else that this process or its children write to standard
    output or error goes to ``log``.
    """
    stream = stream or sys.stdout
    if live and is_terminal(stream):
        return LiveView(plan, log)
    return PlainView(plan, stream)


class PlainView:
    """A line for the first and the last step of a phase and for a step every ``every_seconds``.

    Made for what is no terminal: a file, a CI log, the log of a Ray job.
    """

    def __init__(
        self,
        plan: RunPlan,
        stream: TextIO,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = ViewState(plan)
        self._stream = stream
        self._every_seconds = every_seconds
        self._clock = clock
        self._last_shown = -float("inf")

    def start(self) -> None:
        """Prepare nothing."""

    def step(self, record: StepRecord) -> None:
        """Show the step where it is the first or last of its phase, or enough time has passed."""
        previous = self._state.last
        self._state.step(record)
        is_first = previous is None or previous.phase != record.phase
        is_due = self._clock() - self._last_shown >= self._every_seconds
        if is_first or is_due or record.step == self._state.total:
            self._last_shown = self._clock()
            self._show(step_line(record, self._state))

    def evaluation(self, record: EvaluationRecord) -> None:
        """Show the evaluation."""
        self._state.evaluation(record)
        self._show(evaluation_line(record))

    def samples(self, records: Sequence[SampleRecord]) -> None:
        """Leave samples to ``samples.jsonl``."""

    def workers(self, states: Mapping[str, str]) -> None:
        """Show nothing: workers change with every step, they are for the live view."""

    def message(self, text: str) -> None:
        """Show the message."""
        self._show(text)

    def replay(self, records: Sequence[StepRecord | EvaluationRecord]) -> None:
        """Learn what a resumed run had done before."""
        _replay(self._state, records)

    def close(self) -> None:
        """Give nothing back."""

    def _show(self, line: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        safe = printable(line).encode(encoding, "backslashreplace").decode(encoding)
        self._stream.write(safe + "\n")
        self._stream.flush()


class LiveView:
    """A picture of the run that is redrawn in place, at most four times a second."""

    def __init__(
        self, plan: RunPlan, log: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._state = ViewState(plan)
        self._log = log
        self._clock = clock
        # The clock follows the records' own `seconds`: a resumed run's starts above zero.
        self._seconds, self._seen_at = 0.0, clock()
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._console: Console | None = None

    def start(self) -> None:
        """Take the terminal over and draw the first picture."""
        terminal = self._open.enter_context(reserved_terminal(self._log))
        try:
            self._console = Console(file=terminal)
            self._open.enter_context(
                Live(
                    console=self._console,
                    get_renderable=self._picture,
                    refresh_per_second=REFRESHES_PER_SECOND,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
            )
        except BaseException:
            self._open.close()
            raise

    def step(self, record: StepRecord) -> None:
        """Draw the step."""
        with self._lock:
            self._state.step(record)
            self._seconds, self._seen_at = record.seconds, self._clock()

    def evaluation(self, record: EvaluationRecord) -> None:
        """Draw the evaluation."""
        with self._lock:
            self._state.evaluation(record)

    def samples(self, records: Sequence[SampleRecord]) -> None:
        """Draw the last few of them."""
        with self._lock:
            self._state.add_samples(records)

    def workers(self, states: Mapping[str, str]) -> None:
        """Draw what each worker is doing."""
        with self._lock:
            self._state.workers = dict(states)

    def message(self, text: str) -> None:
        """Draw the message until the next one."""
        with self._lock:
            self._state.message = text

    def replay(self, records: Sequence[StepRecord | EvaluationRecord]) -> None:
        """Learn what a resumed run had done before."""
        with self._lock:
            _replay(self._state, records)
            self._seconds = max((record.seconds for record in records), default=0.0)

    def close(self) -> None:
        """Draw the last picture, leave it on the screen and give the terminal back."""
        self._open.close()

    def _picture(self) -> RenderableType:
        assert self._console is not None
        width, height = self._console.size = _terminal_size(self._console)
        with self._lock:
            seconds = self._seconds + self._clock() - self._seen_at
            return run_panel(self._state, seconds, width, height)


def _replay(state: ViewState, records: Sequence[StepRecord | EvaluationRecord]) -> None:
    for record in records:
        if isinstance(record, StepRecord):
            state.step(record)
        else:
            state.evaluation(record)
    # Time stood still between the interrupted run and this one: estimate from new steps alone.
    state.recent.clear()


def _terminal_size(console: Console) -> os.terminal_size:
    """Return the terminal's size; rich asks descriptors 0 to 2, and none need be the terminal."""
    try:
        return os.get_terminal_size(console.file.fileno())
    except OSError:
        return os.terminal_size((80, 25))
