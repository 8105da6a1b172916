"""kill -9 of an asynchronous run, and of the Redis that keeps its ledger.

What had been trained since the checkpoint is trained again from the recorded batches, and must give
the very same weights: the ledger compares their checksums. On the CPU it does (float32, one learner
rank).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from paceline.configs.load import load_config
from paceline.controller.ledger.balance import Audit, audit
from paceline.controller.ledger.events import Kind
from paceline.controller.ledger.opening import open_store
from paceline.controller.observe.files.records import StepRecord
from tests.integration.commands import PATIENCE_SECONDS, Command, Run, run, run_in
from tests.integration.conftest import train
from tests.redis_server import RedisServer

pytestmark = pytest.mark.timeout(3 * PATIENCE_SECONDS)

NUM_STEPS = 26
CHECKPOINT_EVERY = 10
KILLED_AFTER = 14


def settings(*more: str) -> tuple[str, ...]:
    return (
        f"loop.num_steps={NUM_STEPS}",
        f"checkpoint.every_steps={CHECKPOINT_EVERY}",
        "loop.max_lag=2",
        "rollout.max_restarts=3",
        *more,
    )


def ledger_of(result: Run) -> Audit:
    config = load_config(str(result.folder.config), ())
    store = open_store(config.store, result.folder.root, config.name, read_only=True)
    found = audit(store)
    store.close()
    return found


def assert_whole(result: Run, resumptions: int) -> None:
    """Every group of the finished run is accounted for, and none was trained twice."""
    found = ledger_of(result)
    assert found.faults == []
    assert found.state.diverged == []
    assert found.state.resumed == resumptions
    balance = found.state.balance()
    assert balance.missing == 0
    assert balance.trained == 8 * NUM_STEPS == result.summary.groups["trained"]
    assert max(found.state.ages) <= result.summary.max_lag
    assert result.summary.max_age <= result.summary.max_lag
    assert [record.step for record in result.steps] == list(range(1, NUM_STEPS + 1))


def what_was_trained(record: StepRecord) -> tuple:
    return record.step, record.reward, record.loss, record.age_mean, record.metrics["grad_norm"]


@pytest.fixture
def redis_server(tmp_path) -> Iterator[RedisServer]:
    (tmp_path / "redis").mkdir()
    redis_server = RedisServer(tmp_path / "redis")
    yield redis_server
    redis_server.kill()


def test_a_killed_run_trains_again_what_it_had_though_its_redis_was_killed_too(
    tmp_path, redis_server
):
    """Redis is killed twice under the run and comes back from its file; then the run is killed."""
    result = run_in(tmp_path, "killed")
    arguments = train("killed", *settings("store.type=redis", f"store.url={redis_server.url}"))
    with Command(*arguments, cwd=tmp_path) as command:
        for moment in (3, 7):
            command.wait_until(
                lambda moment=moment: result.has_done(moment), "the moment to kill Redis"
            )
            redis_server.kill()
            redis_server.start()
        command.wait_until(lambda: result.has_done(KILLED_AFTER), "the moment to kill it")
        command.kill()
        command.wait_until_nothing_is_left()
    before = result.steps
    crashed = ledger_of(result)
    assert crashed.faults == []
    checked = run("ledger", "runs/killed", cwd=tmp_path)
    assert checked.code == 0 and "balanced" in checked.output, checked

    ended = run(*arguments, "--resume", cwd=tmp_path)
    assert ended.code == 0, ended.errors
    assert_whole(result, resumptions=1)
    again = result.steps[: len(before)]
    assert [what_was_trained(r) for r in again] == [what_was_trained(r) for r in before]
    events = ledger_of(result).events
    assert events[Kind.FINISHED] <= events[Kind.ADMITTED], "a finished group was sampled again"
