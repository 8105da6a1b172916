"""A process that hangs under a run is found in the configured time, and costs nothing but that."""

from __future__ import annotations

import os
import signal
import time

import pytest

from paceline.controller.observe.files.jsonl import read_lines
from tests.integration.commands import PATIENCE_SECONDS, Command, run_in
from tests.integration.commands import run as run_command
from tests.integration.conftest import train
from tests.integration.test_deaths import assert_intact, assert_one_line, prompts_fed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE_SECONDS)]

ANSWER_SECONDS = 6.0
HANG_SECONDS = 5.0


def test_a_rollout_worker_that_hangs_is_replaced_and_nothing_is_lost_or_trained_twice(tmp_path):
    """One of two engines is stopped as by a debugger: it holds claims, and does not die."""
    run = run_in(tmp_path, "hangs")
    num_steps = 30
    arguments = train(
        "hangs",
        f"loop.num_steps={num_steps}",
        "rollout.num_workers=2",
        f"rollout.answer_seconds={ANSWER_SECONDS}",
        "observability.samples_per_step=8",
        "checkpoint.every_steps=null",
    )
    with Command(*arguments, cwd=tmp_path) as command:
        command.wait_until(lambda: run.has_done(3), "three steps were done")
        hung, _ = command.rollout_workers()
        os.kill(hung.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        command.wait_until(lambda: "starting another" in run.log, "the loss was noticed")
        found_after = time.monotonic() - stopped
        steps_then = len(run.steps)
        command.wait_until(lambda: run.has_done(steps_then + 2), "the other went on")
        code = command.wait()
        assert (code, command.errors) == (0, "")
        command.wait_until_nothing_is_left()
        assert command.shared_folders() == []
    assert found_after < ANSWER_SECONDS + 2
    assert "hangs, it left" in run.log
    assert run.summary.status == "finished"
    assert run.summary.max_age <= run.summary.max_lag
    assert [record.step for record in run.steps] == list(range(1, num_steps + 1))
    assert run.summary.groups["trained"] == 8 * num_steps
    samples, _ = read_lines(run.folder.samples)
    assert [sample["prompt"] for sample in samples] == prompts_fed(run, 8 * num_steps)
    assert run_command("ledger", "runs/hangs", cwd=tmp_path).code == 0


def test_a_learner_rank_that_hangs_is_named_with_every_ranks_stack_and_ends_the_run(tmp_path):
    """One of two ranks is stopped as by a debugger: the other waits in a collective."""
    run = run_in(tmp_path, "rank")
    arguments = train(
        "rank",
        "loop.num_steps=2000",
        "learner.num_ranks=2",
        f"learner.hang_seconds={HANG_SECONDS}",
        "checkpoint.every_steps=2",
    )
    with Command(*arguments, cwd=tmp_path) as command:
        command.wait_until(lambda: run.has_done(3), "three steps were done")
        os.kill(command.learner_ranks()[1].pid, signal.SIGSTOP)
        stopped = time.monotonic()
        command.wait_until(lambda: "failed: " in run.log, "the hang was noticed")
        found_after = time.monotonic() - stopped
        assert command.wait() == 2
        assert_one_line(command, "learner rank", "does not answer for", "of step", "stack is in")
        command.wait_until_nothing_is_left()
        assert command.shared_folders() == []
    assert found_after < 3 * HANG_SECONDS + 10, (
        "and ten for the checkpoint in flight to be given up"
    )
    (report,) = run.folder.root.glob("hang-*.txt")
    assert "== learner rank 0" in report.read_text()
    assert "paceline" in report.read_text()
    assert_intact(run, "does not answer")
