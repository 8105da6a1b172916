"""Processes that die under a run: it goes on with a replacement, or ends with one clear line."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time

import pytest

from paceline.configs.load import load_config
from paceline.controller.data.tokenizer import load_tokenizer
from paceline.controller.observe.files.jsonl import read_lines
from paceline.controller.observe.report.report import write_report
from paceline.controller.wiring.preparation import prompt_set
from tests.integration.commands import PATIENCE_SECONDS, Command, Run, run_in
from tests.integration.commands import run as run_command
from tests.integration.conftest import train

pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)

ANSWER_SECONDS = 6.0
SPARE_SECONDS = 30.0
"""What a busy machine may add to how soon a hang is found; unnoticed, the run would end never."""
MANY_STEPS = "loop.num_steps=2000"
COLLECTIVE_TIMEOUT_SECONDS = 20
DETECTION_SECONDS = 60
"""A dead learner rank is noticed by Ray at once; the others get ten seconds to leave."""


def test_killed_and_hung_rollout_workers_are_replaced_and_nothing_is_lost_or_trained_twice(
    tmp_path,
):
    """Two engines and two learner ranks: an engine's process is killed, then one is stopped.

    With the first one dead the other carries on. The second is stopped as by a debugger: it holds
    claims, and does not die. With both gone no step can be finished, unless by a replacement.
    """
    run = run_in(tmp_path, "replaced")
    num_steps = 30
    arguments = train(
        "replaced",
        f"loop.num_steps={num_steps}",
        "rollout.num_workers=2",
        f"rollout.answer_seconds={ANSWER_SECONDS}",
        "learner.num_ranks=2",
        "observability.samples_per_step=8",
        "checkpoint.every_steps=null",
    )
    with Command(*arguments, cwd=tmp_path) as command:
        command.wait_until(lambda: run.has_done(3), "three steps were done")
        first, second = command.rollout_workers()
        assert len(command.learner_ranks()) == 2
        before = first.cpu_seconds, second.cpu_seconds
        command.wait_until(lambda: run.has_done(13), "ten more were done")
        worked = first.cpu_seconds - before[0], second.cpu_seconds - before[1]
        first.kill()
        command.wait_until(lambda: run.has_done(15), "the survivor had its part in two more")
        os.kill(second.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        command.wait_until(lambda: "hangs, it left" in run.log, "the hang was noticed")
        found_after = time.monotonic() - stopped
        code = command.wait()
        assert (code, command.errors) == (0, "")
        command.wait_until_nothing_is_left()
        assert command.shared_folders() == []
    assert min(worked) > 0.2 * max(worked), f"only one of two engines worked: {worked}"
    assert found_after < ANSWER_SECONDS + SPARE_SECONDS
    assert run.summary.status == "finished"
    assert run.summary.max_age <= run.summary.max_lag
    assert [record.step for record in run.steps] == list(range(1, num_steps + 1))
    assert run.summary.groups["trained"] == 8 * num_steps
    assert run.log.count(": starting another") == 2
    assert len(re.findall(r"rollout worker \d died: starting another", run.log)) == 1
    samples, _ = read_lines(run.folder.samples)
    assert [sample["prompt"] for sample in samples] == prompts_fed(run, 8 * num_steps)
    assert run_command("ledger", "runs/replaced", cwd=tmp_path).code == 0


def prompts_fed(run: Run, count: int) -> list[str]:
    """The first training prompts of a run's data: strict order trains them one by one."""
    config = load_config(str(run.folder.config), ())
    feed = prompt_set(config, load_tokenizer(config.model)).feed()
    return [prompt.text for _, prompt in itertools.islice(feed, count)]


def test_a_rollout_worker_that_may_not_be_replaced_ends_the_run_with_one_line(tmp_path):
    run = run_in(tmp_path, "lost")
    with Command(*train("lost", MANY_STEPS, "rollout.max_restarts=0"), cwd=tmp_path) as command:
        command.wait_until(lambda: run.has_done(3), "three steps were done")
        (worker,) = command.rollout_workers()
        worker.kill()
        assert command.wait() == 2
        assert_one_line(command, "rollout worker 0 died once", "rollout.max_restarts is 0")
        command.wait_until_nothing_is_left()
    assert_intact(run, "rollout worker 0 died once")


def test_a_killed_learner_rank_ends_the_run_with_one_line_in_bounded_time(tmp_path):
    run = run_in(tmp_path, "rank")
    arguments = train(
        "rank",
        MANY_STEPS,
        "learner.num_ranks=2",
        f"learner.collective_timeout_seconds={COLLECTIVE_TIMEOUT_SECONDS}",
    )
    with Command(*arguments, cwd=tmp_path) as command:
        command.wait_until(lambda: run.has_done(3), "three steps were done")
        command.learner_ranks()[1].kill()
        died = time.monotonic()
        assert command.wait() == 2
        assert time.monotonic() - died < DETECTION_SECONDS
        assert_one_line(command, "learner rank", "died")
        command.wait_until_nothing_is_left()
    assert_intact(run, "learner rank")


def assert_one_line(command: Command, *parts: str) -> None:
    assert command.errors.count("\n") == 1, command.errors
    assert command.errors.startswith("paceline: ")
    assert all(part in command.errors for part in parts), command.errors


def assert_intact(run: Run, cause: str) -> None:
    """The folder tells what was done until then, and why it ended."""
    summary = run.summary
    assert summary.status == "failed"
    assert cause in summary.error
    assert summary.steps >= 3
    steps = [record.step for record in run.steps]
    assert steps == list(range(1, len(steps) + 1))
    assert summary.groups["trained"] == 8 * len(steps)
    assert f"failed: {summary.error}" in run.log
    assert cause in run.folder.report.read_text()
    write_report(run.folder)
