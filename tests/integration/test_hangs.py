"""A learner rank that hangs under a run is found in the configured time, and named."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.integration.commands import PATIENCE_SECONDS, Command, run_in
from tests.integration.conftest import train
from tests.integration.test_deaths import SPARE_SECONDS, assert_intact, assert_one_line

pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)

HANG_SECONDS = 5.0


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
    # ten for the checkpoint in flight to be given up
    assert found_after < 3 * HANG_SECONDS + 10 + SPARE_SECONDS
    (report,) = run.folder.root.glob("hang-*.txt")
    assert "== learner rank 0" in report.read_text()
    assert "paceline" in report.read_text()
    assert_intact(run, "does not answer")
