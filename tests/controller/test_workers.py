"""The worker pool: never serve stale, spread the load, replace the lost."""

import asyncio

import pytest

from paceline.configs.errors import ClusterError
from paceline.controller.parts import WorkerLost
from paceline.weights_sync.handle import WeightSyncError
from tests.controller.fake_workers import FakeWorker, handle, pool_of, request
from tests.controller.virtual_time import run_virtually


def test_nobody_serves_before_the_first_weights():
    async def scenario():
        pool = pool_of([FakeWorker()])
        waiting = asyncio.ensure_future(pool.generate(request("a")))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await pool.update_weights(handle(0))
        await asyncio.wait_for(waiting, 1)

    run_virtually(scenario())


def test_requests_go_where_fewest_samples_are_outstanding():
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool = pool_of(workers)
        await pool.update_weights(handle(0))
        for worker in workers:
            worker.gate.clear()
        tasks = [
            asyncio.ensure_future(pool.generate(request(name, samples)))
            for name, samples in [("a", 4), ("b", 1), ("c", 1), ("d", 1)]
        ]
        await asyncio.sleep(0.01)
        assert [name for name, _ in workers[0].requests] == ["a"]
        assert [name for name, _ in workers[1].requests] == ["b", "c", "d"]
        for worker in workers:
            worker.gate.set()
        await asyncio.gather(*tasks)

    run_virtually(scenario())


def test_a_replacement_serves_only_after_it_acknowledged_the_current_version():
    async def scenario():
        first, spare = FakeWorker(), FakeWorker()
        pool = pool_of([first], [spare])
        await pool.update_weights(handle(0))
        first.dead = True
        with pytest.raises(WorkerLost):
            await pool.generate(request("a"))
        await pool.update_weights(handle(1))
        await asyncio.wait_for(pool.generate(request("b")), 1)
        assert spare.requests == [("b", 1)]

    run_virtually(scenario())


def test_a_worker_that_is_dead_when_weights_arrive_is_replaced_too():
    async def scenario():
        first, spare = FakeWorker(), FakeWorker()
        first.dead = True
        pool = pool_of([first], [spare])
        await pool.update_weights(handle(3))
        await asyncio.wait_for(pool.generate(request("a")), 1)
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
            await asyncio.wait_for(pool.generate(request("a")), 1)

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
        await asyncio.wait_for(pool.generate(request("again")), 1)

    run_virtually(scenario())


def test_a_worker_that_acknowledges_other_bytes_is_an_error():
    async def scenario():
        pool = pool_of(
            [FakeWorker(acknowledges=lambda handle: (handle.version, handle.checksum + 1))]
        )
        with pytest.raises(WeightSyncError, match="acknowledged version 0"):
            await pool.update_weights(handle(0))

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
        await asyncio.wait_for(pool.generate(request("a")), 1)
        first.gate.set()
        with pytest.raises(WorkerLost):
            await late
        await asyncio.wait_for(pool.generate(request("b")), 1)
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
        await asyncio.wait_for(asyncio.gather(waiting, newer), 1)
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
            await asyncio.sleep(0)
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
