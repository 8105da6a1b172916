"""What is shown: plain lines anywhere, a picture that fits its terminal and gives it back."""

from __future__ import annotations

import fcntl
import io
import math
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.recorder import read_records
from paceline.controller.observe.files.records import EvaluationRecord, SampleRecord, StepRecord
from paceline.controller.observe.view.panel import run_panel
from paceline.controller.observe.view.state import RunPlan, ViewState, time_parts
from paceline.controller.observe.view.text import (
    buckets,
    count,
    duration,
    fit_line,
    printable,
    sparkline,
)
from paceline.controller.observe.view.view import PlainView, open_view

PLAN = RunPlan("demo", num_steps=240, warm_start_steps=400, max_lag=1)
ESCAPE = "\x1b"


def played(folder: RunFolder, plan: RunPlan = PLAN) -> ViewState:
    state = ViewState(plan)
    for record in read_records(folder):
        if isinstance(record, StepRecord):
            state.step(record)
        else:
            state.evaluation(record)
    return state


def drawn(state: ViewState, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(run_panel(state, 60.0, width, height))
    return capture.get().splitlines()


def plain_lines(records: list[StepRecord], clock: Callable[[], float]) -> list[str]:
    stream = io.StringIO()
    view = PlainView(PLAN, stream, every_seconds=10.0, clock=clock)
    for record in records:
        view.step(record)
    return stream.getvalue().splitlines()


def test_plain_lines_come_first_last_and_every_few_seconds() -> None:
    now = 0.0
    records = [StepRecord("train", step, float(step), reward=0.5) for step in range(1, 241)]

    def clock() -> float:
        return now

    stream = io.StringIO()
    view = PlainView(PLAN, stream, every_seconds=10.0, clock=clock)
    for record in records:
        now = record.seconds
        view.step(record)
    shown = [int(line.split("/")[0].split()[-1]) for line in stream.getvalue().splitlines()]
    assert shown == [*range(1, 232, 10), 240]


def test_a_plain_line_leaves_out_what_was_not_measured() -> None:
    record = StepRecord("warm_start", 1, 0.1, loss=math.nan, metrics={"kl": None})
    (line,) = plain_lines([record], lambda: 0.0)
    assert line == "[warm start 1/400] loss nan"


def test_plain_lines_are_ascii_and_survive_any_encoding() -> None:
    raw = io.BytesIO()
    view = PlainView(PLAN, io.TextIOWrapper(raw, encoding="ascii"))
    view.step(StepRecord("train", 1, 0.1, reward=0.5, age_mean=0.5, age_max=1))
    view.evaluation(EvaluationRecord.measured("before", 0, 0.1, 0.4, 0.2, 256))
    view.message("größer \x1b[2J")
    text = raw.getvalue().decode("ascii")
    assert "[held-out, before, step 0] greedy 40.0% +-3.1 | T=1 20.0% +-2.5 | 256 prompts" in text
    assert "gr\\xf6\\xdfer" in text
    assert ESCAPE not in text


def test_what_is_no_terminal_gets_plain_lines(tmp_path: Path) -> None:
    view = open_view(PLAN, live=True, log=tmp_path / "run.log", stream=io.StringIO())
    assert isinstance(view, PlainView)


@pytest.mark.parametrize(("width", "height"), [(200, 60), (118, 40), (80, 24), (60, 12), (40, 8)])
def test_the_picture_fits_its_terminal(
    synthetic_run: Callable[..., RunFolder], width: int, height: int
) -> None:
    state = played(synthetic_run())
    state.workers = {f"rollout-{i}": "generating" for i in range(12)}
    state.add_samples([SampleRecord(1, "p" * 300, "c\n" * 300, 1.0)] * 4)
    state.message = "evaluating " * 40
    for shown in (state, ViewState(PLAN)):
        lines = drawn(shown, width, height)
        assert len(lines) <= height
        assert all(len(line) <= width for line in lines)


def test_the_picture_says_what_matters(synthetic_run: Callable[..., RunFolder]) -> None:
    text = "\n".join(drawn(played(synthetic_run(train_steps=120)), 118, 40))
    for expected in (
        "120 of 240", "left", "reward", "greedy 0.0% → …", "p50", "rollouts", "learner",
        "bound 1", "wait for batch", "zero_signal", "inflight",
    ):  # fmt: skip
        assert expected in text


def test_the_picture_bears_numbers_that_are_missing_or_not_finite() -> None:
    state = ViewState(PLAN)
    state.step(StepRecord("train", 1, 0.1))
    state.step(
        StepRecord(
            "train",
            2,
            0.2,
            reward=math.nan,
            loss=math.inf,
            age_mean=math.nan,
            rollout_tokens_per_second=math.nan,
            time={"train": None},
            dropped={"zero_signal": None},
        )
    )
    assert drawn(state, 80, 24)


def test_escape_sequences_in_samples_do_not_reach_the_terminal() -> None:
    state = ViewState(PLAN)
    state.step(StepRecord("train", 1, 0.1, reward=0.5))
    state.add_samples([SampleRecord(1, "a\x1b[2Jb", "\x9b31m\r\x07", 0.0)])
    text = "\n".join(drawn(state, 100, 30))
    assert "a\\x1b[2Jb" in text
    assert not set(text) & {ESCAPE, "\x9b", "\r", "\x07"}


def test_time_left_follows_recent_steps() -> None:
    state = ViewState(PLAN)
    for step in range(1, 101):
        state.step(StepRecord("train", step, 2.0 * step))
    assert state.seconds_left == pytest.approx(280.0)


def test_parts_of_the_time_add_up_to_the_step_without_what_runs_beside_them() -> None:
    time = {"train": 0.5, "publish": 0.25, "generate": 9.0, "step": 1.0, "nothing": None}
    parts = time_parts(StepRecord("train", 1, 1.0, time=time))
    assert parts == {"train": 0.5, "publish": 0.25, "other": 0.25}
    assert "other" not in time_parts(StepRecord("train", 1, 1.0, time={"train": 0.5}))


def test_a_phase_begins_with_curves_of_its_own() -> None:
    state = ViewState(PLAN)
    state.step(StepRecord("warm_start", 1, 1.0, loss=3.0))
    state.step(StepRecord("train", 1, 9.0, loss=0.1))
    assert state.losses == [0.1]
    assert state.seconds_left is None


LIVE_RUN = """
import logging, subprocess, sys
from pathlib import Path
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.view.state import RunPlan
from paceline.controller.observe.files.recorder import RunRecorder
from paceline.controller.observe.files.records import StepRecord
from paceline.controller.observe.view.view import open_view

logging.basicConfig(level=logging.INFO)  # holds on to today's sys.stderr
folder = RunFolder.create(Path(sys.argv[1]))
view = open_view(RunPlan("demo", 3, 0, 1), live=True, log=folder.log)
with RunRecorder(folder, view, tensorboard=False) as recorder:
    recorder.message("starting engines")
    for step in (1, 2, 3):
        recorder.step(StepRecord("train", step, 0.1 * step, reward=0.25 * step))
        logging.info("noise of a logger")
        print("noise of a print")
        subprocess.run(["echo", "noise of a child"], check=True)
    raise {error}
"""


def on_a_terminal(script: str, *arguments: str) -> str:
    """What a script writes to a terminal of 30 lines and 100 columns, standard input elsewhere."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    written = b""
    while part := _read(ours):
        written += part
    os.close(ours)
    process.wait(timeout=60)
    return written.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux ends a terminal without writers with an error
        return b""


@pytest.mark.parametrize("error", ["RuntimeError('the cause')", "KeyboardInterrupt"])
def test_a_live_view_gives_the_terminal_back_and_lets_the_error_through(
    tmp_path: Path, error: str
) -> None:
    text = on_a_terminal(LIVE_RUN.replace("{error}", error), str(tmp_path / "run"))
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert text.count(hide) == text.count(show) == 1
    last_picture, _, after = text.partition(show)
    assert "3 of 3" in last_picture
    assert "Traceback" in after
    assert error.partition("(")[0] in after
    assert "noise" not in text
    log = (tmp_path / "run" / "run.log").read_text()
    assert "starting engines" in log
    for source in ("logger", "print", "child"):
        assert log.count(f"noise of a {source}") == 3


def test_text_is_cut_and_cleaned() -> None:
    assert fit_line("a\nb\tc" + "d" * 20, 8) == "a⏎b cdd…"
    assert printable("ü漢字👩‍🚀\u3000\n") == "ü漢字👩‍🚀\u3000\n"
    assert printable("\u202e\ud800\x00") == "\\u202e\\ud800\\x00"


def test_curves_in_block_characters_keep_their_ends() -> None:
    assert sparkline([0.0, None, math.nan, 1.0], 10) == "▁█"
    assert sparkline([5.0, 5.0], 10) == "▁▁"
    assert sparkline([], 10) == ""
    assert len(sparkline([0.5] * 1000, 40)) == 40


def test_buckets_are_means_of_neighbours() -> None:
    assert buckets([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert buckets([], 3) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7.54, "7.5s"), (59.6, "1m 00s"), (192, "3m 12s"), (7500, "2h 05m"), (math.nan, "-")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12"), (999_999, "1M"), (1_234_567, "1.23M"), (None, "-")]
)
def test_counts_are_short(value: float | None, text: str) -> None:
    assert count(value) == text
