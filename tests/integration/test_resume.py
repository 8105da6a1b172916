"""An interrupted and resumed synchronous run equals the uninterrupted one.

The prompts, the random stream of every sample and the order of summation in the learner are fixed
by the configuration. What is not fixed is which requests share an engine's batch: it depends on
when they arrive. On the CPU the products of this small model do not depend on it, row by row: runs
with 64 or 7 sequences a batch, with one worker or two, were found bitwise equal (AVX-512, float32).
``TOLERANCE`` leaves room for other kernels' last digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from paceline.controller.observe.files.jsonl import read_lines
from tests.integration.commands import PATIENCE_SECONDS, Command, Ended, Run, run, run_in
from tests.integration.conftest import LEARNS_QUICKLY, train

pytestmark = pytest.mark.timeout(4 * PATIENCE_SECONDS)

NUM_STEPS = 8
TOLERANCE = 1e-5

SETTINGS = (
    f"loop.num_steps={NUM_STEPS}",
    "loop.max_lag=0",
    "checkpoint.every_steps=1",
    "observability.samples_per_step=8",
    *LEARNS_QUICKLY,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Run:
    root = tmp_path_factory.mktemp("uninterrupted")
    ended = run(*train("run", *SETTINGS), cwd=root)
    assert ended.code == 0, ended.errors
    return run_in(root, "run")


@dataclass(frozen=True)
class Interruption:
    """How a run was left when it had been interrupted."""

    ended: Ended
    status: str
    steps: int
    num_recorded: int
    checkpoints: list[str]
    shared_folders: list


@dataclass(frozen=True)
class ResumedRun:
    run: Run
    after_ctrl_c: Interruption
    steps_when_killed: int
    ledger_when_killed: Ended
    last: Ended


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> ResumedRun:
    """The same run, interrupted by Ctrl-C, resumed, killed, and resumed to its end."""
    root = tmp_path_factory.mktemp("resumed")
    result = run_in(root, "run")
    with Command(*train("run", *SETTINGS), cwd=root) as command:
        command.wait_until(lambda: result.has_done(2), "two steps were done")
        command.interrupt()
        code = command.wait()
        command.wait_until_nothing_is_left()
        after_ctrl_c = Interruption(
            Ended(code, command.output, command.errors),
            result.summary.status,
            result.summary.steps,
            len(result.steps),
            sorted(path.name for path in result.folder.checkpoints.iterdir()),
            command.shared_folders(),
        )
    resume = [*train("run", *SETTINGS), "--resume"]
    with Command(*resume, cwd=root) as command:
        enough = after_ctrl_c.steps + 2
        command.wait_until(lambda: result.has_done(enough), f"{enough} steps were done")
        command.kill()
        command.wait_until_nothing_is_left()
        steps_when_killed = len(result.steps)
    ledger_when_killed = run("ledger", "runs/run", cwd=root)
    last = run(*resume, cwd=root)
    return ResumedRun(result, after_ctrl_c, steps_when_killed, ledger_when_killed, last)


def test_ctrl_c_saves_the_steps_it_finished_and_leaves_nothing_running(resumed):
    left = resumed.after_ctrl_c
    assert left.ended.code == 130
    assert left.ended.errors == ""
    assert left.status == "interrupted"
    assert 2 <= left.steps == left.num_recorded < NUM_STEPS
    assert left.checkpoints[-1] == f"step-{left.steps:06d}"
    assert left.shared_folders == []


def test_a_killed_run_goes_on_from_its_last_checkpoint(resumed):
    assert resumed.steps_when_killed < NUM_STEPS, "killed too late for the test to mean anything"
    assert resumed.last.code == 0, resumed.last.errors
    assert resumed.run.summary.status == "finished"
    (_, first), (_, second) = resumptions(resumed.run)
    assert first == resumed.after_ctrl_c.steps
    assert resumed.steps_when_killed - 1 <= second <= resumed.steps_when_killed


def test_the_ledger_balances_when_the_run_was_killed_and_when_it_is_over(resumed):
    whole = run("ledger", "runs/run", cwd=resumed.run.folder.root.parents[1])
    for ended in (resumed.ledger_when_killed, whole):
        assert ended.code == 0 and "balanced" in ended.output, ended


def resumptions(run: Run) -> list[tuple[str, int]]:
    lines = (line.partition("resuming after step ") for line in run.log.splitlines())
    return [(line, int(step)) for line, found, step in lines if found]


def test_a_resumed_run_has_every_step_once_and_counts_it_once(resumed, uninterrupted):
    assert [record.step for record in resumed.run.steps] == list(range(1, NUM_STEPS + 1))
    mine, whole = resumed.run.summary, uninterrupted.summary
    assert (mine.steps, mine.groups, mine.tokens) == (whole.steps, whole.groups, whole.tokens)


def test_the_clock_of_a_resumed_run_counts_all_its_parts(resumed):
    seconds = [record.seconds for record in resumed.run.steps]
    wall = resumed.run.summary.wall_seconds
    assert seconds == sorted(seconds)
    assert seconds[-1] < wall["total"]
    assert sum(record.time["step"] for record in resumed.run.steps) <= wall["train"]


def test_a_resumed_run_trains_on_the_same_samples_with_the_same_rewards(resumed, uninterrupted):
    assert samples(resumed.run) == samples(uninterrupted)
    assert [r.reward for r in resumed.run.steps] == [r.reward for r in uninterrupted.steps]


def samples(run: Run) -> list[tuple]:
    lines, _ = read_lines(run.folder.samples)
    return [(line["step"], line["prompt"], line["completion"], line["reward"]) for line in lines]


def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(resumed, uninterrupted):
    from safetensors.torch import load_file

    mine = load_file(resumed.run.folder.final / "model.safetensors")
    whole = load_file(uninterrupted.folder.final / "model.safetensors")
    initial = load_file(uninterrupted.folder.root / "initial" / "model.safetensors")
    differences = {name: float((mine[name] - whole[name]).abs().max()) for name in whole}
    assert max(differences.values()) <= TOLERANCE, differences
    # What training changed is far above the tolerance.
    assert max(float((whole[name] - initial[name]).abs().max()) for name in whole) > 1e-2


def test_a_resumed_run_is_as_good(resumed, uninterrupted):
    mine, whole = resumed.run.summary, uninterrupted.summary
    assert (mine.greedy_before, mine.greedy_after) == (whole.greedy_before, whole.greedy_after)
    assert (mine.sampled_before, mine.sampled_after) == (whole.sampled_before, whole.sampled_after)
