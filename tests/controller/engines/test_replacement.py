"""The worker pool: workers that are lost are replaced, and none serves what is stale."""

import asyncio

import pytest

from paceline.configs.errors import ClusterError
from paceline.controller.groups.buffer import WorkerLost
from paceline.weights_sync.handle import WeightSyncError
from tests.controller.engines.fake_workers import (
    PATIENCE,
    START_SECONDS,
    FakeWorker,
    cancelled,
    handle,
    pool_of,
    request,
    seconds_until,
    serving,
    shut,
)
from tests.controller.virtual_time import run_virtually


def test_a_replacement_serves_only_after_it_acknowledged_the_current_version():
    async def scenario():
        first, spare = FakeWorker(), FakeWorker()
        pool = pool_of([first], [spare])
        await pool.update_weights(handle(0))
        first.dead = True
        with pytest.raises(WorkerLost):
            await pool.generate(request("a"))
        await pool.update_weights(handle(1))
        await asyncio.wait_for(pool.generate(request("b")), PATIENCE)
        assert spare.requests == [("b", 1)]

    run_virtually(scenario())


def test_a_worker_that_is_dead_when_weights_arrive_is_replaced_too():
    async def scenario():
        first, spare = FakeWorker(), FakeWorker()
        first.dead = True
        pool = pool_of([first], [spare])
        await pool.update_weights(handle(3))
        await asyncio.wait_for(pool.generate(request("a")), PATIENCE)
        assert spare.requests == [("a", 3)]

    run_virtually(scenario())


def test_a_replacement_that_dies_too_is_replaced_until_the_limit():
    async def scenario():
        workers = [FakeWorker() for _ in range(3)]
        for worker in workers:
            worker.dead = True
        pool = pool_of(workers[:1], workers[1:], max_restarts=2)
        await pool.update_weights(handle(0))
        with pytest.raises(ClusterError, match="died 3 times"):
            await asyncio.wait_for(pool.generate(request("a")), PATIENCE)

    run_virtually(scenario())


def test_many_calls_that_find_a_worker_dead_replace_it_once():
    async def scenario():
        first, spare = FakeWorker(), FakeWorker()
        pool = pool_of([first], [spare], max_restarts=1)
        await pool.update_weights(handle(0))
        first.gate.clear()
        tasks = [asyncio.ensure_future(pool.generate(request(str(i)))) for i in range(5)]
        await asyncio.sleep(0.01)
        first.dead = True
        first.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, WorkerLost) for result in results)
        await asyncio.wait_for(pool.generate(request("again")), PATIENCE)

    run_virtually(scenario())


LIES = {
    "other bytes": lambda handle: (handle.version, handle.checksum + 1),
    "an old version": lambda handle: (handle.version - 1, handle.checksum),
}


@pytest.mark.parametrize("acknowledges", LIES.values(), ids=LIES)
def test_a_worker_that_acknowledges_something_else_is_an_error_and_gets_no_request(acknowledges):
    async def scenario():
        liar = FakeWorker(acknowledges=acknowledges)
        pool = pool_of([FakeWorker(), liar])
        claims = [
            asyncio.ensure_future(pool.generate(request(str(i), prompt=(i,)))) for i in range(9)
        ]
        with pytest.raises(WeightSyncError, match="worker 1 acknowledged version"):
            await pool.update_weights(handle(7))
        await cancelled(*claims)
        assert liar.requests == []

    run_virtually(scenario())


@pytest.mark.parametrize("acknowledges", LIES.values(), ids=LIES)
def test_a_replacement_that_acknowledges_something_else_ends_the_run_and_gets_no_request(
    acknowledges,
):
    async def scenario():
        first, liar = FakeWorker(), FakeWorker(acknowledges=acknowledges)
        pool = await serving([first], [liar])
        first.dead = True
        with pytest.raises(WorkerLost):
            await pool.generate(request("a"))
        with pytest.raises(WeightSyncError, match="worker 0 acknowledged version"):
            await pool.generate(request("b"))
        assert liar.requests == []

    run_virtually(scenario())


def test_nothing_is_sent_to_a_lost_worker_that_weights_arrive_for():
    async def scenario():
        first, spare = FakeWorker(), FakeWorker()
        pool = await serving([first], [spare])
        shut(first)
        claim = asyncio.ensure_future(pool.generate(request("a")))
        await asyncio.sleep(1)
        first.hangs = True
        await pool.update_weights(handle(1))
        with pytest.raises(WorkerLost):
            await claim
        assert pool.states() == {"rollout 0": "restarting"}
        taken, _ = await seconds_until(pool.generate(request("b")))
        assert taken == START_SECONDS
        assert spare.requests == [("b", 1)]

    run_virtually(scenario())


def test_late_news_of_a_death_does_not_replace_the_replacement():
    async def scenario():
        first, spare = FakeWorker(), FakeWorker()
        pool = pool_of([first], [spare], max_restarts=1)
        await pool.update_weights(handle(0))
        first.gate.clear()
        late = asyncio.ensure_future(pool.generate(request("late")))
        await asyncio.sleep(0.01)
        first.dead = True
        await pool.update_weights(handle(1))  # finds it dead; the spare takes its seat
        await asyncio.wait_for(pool.generate(request("a")), PATIENCE)
        first.gate.set()
        with pytest.raises(WorkerLost):
            await late
        await asyncio.wait_for(pool.generate(request("b")), PATIENCE)
        assert [name for name, _ in spare.requests] == ["a", "b"]

    run_virtually(scenario())


def test_a_replacement_that_was_overtaken_by_an_update_catches_up_before_it_serves():
    async def scenario():
        first, spare = FakeWorker(), FakeWorker()
        first.dead = True
        pool = pool_of([first], [spare])
        loading, go_on, update = asyncio.Event(), asyncio.Event(), spare.update_weights

        async def slow_update(published):
            loading.set()
            await go_on.wait()
            return await update(published)

        spare.update_weights = slow_update
        await pool.update_weights(handle(0))
        waiting = asyncio.ensure_future(pool.generate(request("a")))
        await loading.wait()
        newer = asyncio.ensure_future(pool.update_weights(handle(1)))
        spare.update_weights = update
        await asyncio.sleep(0.01)
        assert not waiting.done()
        go_on.set()
        await asyncio.wait_for(asyncio.gather(waiting, newer), PATIENCE)
        assert spare.requests == [("a", 1)]

    run_virtually(scenario())


def test_a_check_of_every_worker_survives_the_death_of_one_and_has_it_replaced():
    async def scenario():
        workers, spare = [FakeWorker(), FakeWorker()], FakeWorker()
        pool = pool_of(workers, [spare])
        await pool.update_weights(handle(0))
        assert len(await pool.generate_everywhere(request("a"))) == 2
        workers[0].dead = True
        assert len(await pool.generate_everywhere(request("b"))) == 1
        while pool.states()["rollout 0"] == "restarting":
            await asyncio.sleep(1)
        assert len(await pool.generate_everywhere(request("c"))) == 2
        assert spare.requests == [("c.0", 0)]

    run_virtually(scenario())


def test_the_last_death_says_how_often_it_died():
    async def scenario():
        worker = FakeWorker()
        worker.dead = True
        pool = pool_of([worker], max_restarts=0)
        await pool.update_weights(handle(0))
        with pytest.raises(ClusterError, match="worker 0 died once and rollout.max_restarts is 0"):
            await pool.generate(request("a"))

    run_virtually(scenario())
