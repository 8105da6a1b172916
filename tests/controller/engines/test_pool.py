"""The worker pool: the load is spread, and a place in the queue is kept or given up."""

import asyncio

import pytest

from paceline.configs.errors import ClusterError
from paceline.controller.groups.buffer import WorkerLost
from tests.controller.engines.fake_workers import (
    PATIENCE,
    FakeWorker,
    cancelled,
    handle,
    pool_of,
    request,
    serving,
    shut,
)
from tests.controller.virtual_time import run_virtually


def test_nobody_serves_before_the_first_weights():
    async def scenario():
        pool = pool_of([FakeWorker()])
        waiting = asyncio.ensure_future(pool.generate(request("a")))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await pool.update_weights(handle(0))
        await asyncio.wait_for(waiting, PATIENCE)

    run_virtually(scenario())


def test_requests_go_where_fewest_tokens_are_outstanding():
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool = await serving(workers)
        shut(*workers)
        tasks = [
            asyncio.ensure_future(pool.generate(request(name, 1, (index,), max_tokens)))
            for index, (name, max_tokens) in enumerate(
                [("a", 400), ("b", 100), ("c", 100), ("d", 100)]
            )
        ]
        await asyncio.sleep(1)
        assert [name for name, _ in workers[0].requests] == ["a"]
        assert [name for name, _ in workers[1].requests] == ["b", "c", "d"]
        for worker in workers:
            worker.gate.set()
        await asyncio.gather(*tasks)

    run_virtually(scenario())


def test_a_prompt_goes_where_it_was_sampled_before_while_the_load_allows():
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool = await serving(workers)
        await pool.generate(request("first", prompt=(1, 2)))
        shut(*workers)
        tasks = [
            asyncio.ensure_future(pool.generate(request(name, prompt=prompt)))
            for name, prompt in [("other", (3,)), ("again", (1, 2)), ("and again", (1, 2))]
        ]
        await asyncio.sleep(1)
        assert [name for name, _ in workers[0].requests] == ["first", "other", "again"]
        assert [name for name, _ in workers[1].requests] == ["and again"]
        await cancelled(*tasks)

    run_virtually(scenario())


def test_a_worker_holds_so_many_samples_and_what_waits_is_served_in_order():
    async def scenario():
        worker = FakeWorker()
        pool = await serving([worker], max_samples=4)
        shut(worker)
        sizes = {"a": 2, "b": 2, "c": 3, "d": 1, "e": 9, "f": 1}
        tasks = [
            asyncio.ensure_future(pool.generate(request(name, size, (size,))))
            for name, size in sizes.items()
        ]
        held = []
        while worker.running or not held:
            await asyncio.sleep(1)
            held.append("".join(worker.running))
            assert pool.states()["rollout 0"] == f"v0, {sum(sizes[n] for n in held[-1])} samples"
            if held[-1]:
                worker.running[held[-1][0]].set()
        assert held == ["ab", "b", "cd", "d", "e", "f", ""]
        await asyncio.gather(*tasks)

    run_virtually(scenario())


def test_a_caller_who_leaves_gives_up_his_place_in_the_queue_or_at_the_worker():
    async def scenario():
        worker = FakeWorker()
        pool = await serving([worker], max_samples=1)
        shut(worker)
        tasks = [
            asyncio.ensure_future(pool.generate(request(name, prompt=(ord(name),))))
            for name in "abcd"
        ]
        await asyncio.sleep(1)
        await cancelled(tasks[1], tasks[0])  # one waits, one runs
        await asyncio.sleep(1)
        assert worker.interrupted == ["a"]
        assert list(worker.running) == ["c"]
        worker.running["c"].set()
        while not tasks[2].done():
            await asyncio.sleep(0)
        tasks[3].cancel()  # it was given the place, and has not noticed
        await asyncio.sleep(1)
        assert pool.states() == {"rollout 0": "v0, 0 samples"}

    run_virtually(scenario())


def test_those_behind_one_who_leaves_the_queue_move_up():
    async def scenario():
        worker = FakeWorker()
        pool = await serving([worker], max_samples=4)
        shut(worker)
        tasks = [
            asyncio.ensure_future(pool.generate(request(name, size, (size,))))
            for name, size in {"a": 3, "b": 4, "c": 1}.items()
        ]
        await asyncio.sleep(1)
        await cancelled(tasks[1])
        await asyncio.sleep(1)
        assert list(worker.running) == ["a", "c"]
        await cancelled(*tasks)

    run_virtually(scenario())


@pytest.mark.parametrize("dies", [False, True])
def test_whoever_leaves_the_queue_at_whatever_moment_harms_nobody(dies):
    async def scenario(moment):
        worker = FakeWorker()
        pool = await serving([worker], max_samples=1, max_restarts=0)
        shut(worker)
        first, leaver, last = (
            asyncio.ensure_future(pool.generate(request(name, prompt=(ord(name),))))
            for name in "abc"
        )
        await asyncio.sleep(1)
        worker.dead = dies
        worker.gate.set()
        for _ in range(moment):
            await asyncio.sleep(0)
        leaver.cancel()
        results = await asyncio.gather(first, leaver, last, return_exceptions=True)
        if dies:
            assert [type(results[0]), type(results[2])] == [WorkerLost, ClusterError]
        else:
            assert results[0][0].is_finished and results[2][0].is_finished
            assert pool.states() == {"rollout 0": "v0, 0 samples"}

    for moment in range(12):
        run_virtually(asyncio.wait_for(scenario(moment), PATIENCE))
