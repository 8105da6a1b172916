"""The worker pool: never serve stale, spread the load, replace the lost."""

import asyncio

import pytest

from paceline.configs.errors import ClusterError
from paceline.controller.groups.buffer import WorkerLost
from paceline.weights_sync.handle import WeightSyncError
from tests.controller.engines.fake_workers import (
    ANSWER_SECONDS,
    CLAIM_SECONDS,
    START_SECONDS,
    FakeWorker,
    handle,
    pool_of,
    request,
)
from tests.controller.virtual_time import run_virtually

PATIENCE = 1000
"""Seconds, none of them real, after which a test waits for something that will not happen."""


async def serving(workers, *arguments, **settings):
    """A pool whose workers serve version 0."""
    pool = pool_of(workers, *arguments, **settings)
    await pool.update_weights(handle(0))
    return pool


def shut(*workers):
    """Have workers hold the requests they get."""
    for worker in workers:
        worker.gate.clear()


async def cancelled(*tasks):
    """Cancel tasks and see them end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def seconds_until(awaitable):
    """How long it took, and its result."""
    clock = asyncio.get_running_loop().time
    began = clock()
    result = await awaitable
    return clock() - began, result


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


def test_what_a_slow_worker_had_for_too_long_goes_on_elsewhere():
    async def scenario():
        slow, other = FakeWorker(), FakeWorker()
        pool = await serving([slow, other])
        shut(slow)
        taken, completions = await seconds_until(pool.generate(request("a", 2)))
        assert taken == CLAIM_SECONDS
        assert not any(completion.is_finished for completion in completions)
        continued = request("b", 2, partial=completions)
        taken, completions = await seconds_until(pool.generate(continued))
        assert taken == 0
        assert all(completion.is_finished for completion in completions)
        assert other.requests == [("b", 0)]

    run_virtually(scenario())


def test_a_slow_worker_goes_on_itself_where_no_other_serves():
    async def scenario():
        slow = FakeWorker()
        pool = await serving([slow])
        shut(slow)
        await pool.generate(request("a"))
        slow.gate.set()
        (completion,) = await pool.generate(request("b"))
        assert completion.is_finished

    run_virtually(scenario())


def hang(worker):
    worker.hangs = True


def get_stuck(worker):
    worker.stuck = True


@pytest.mark.parametrize(("fault", "seconds"), [(hang, ANSWER_SECONDS), (get_stuck, CLAIM_SECONDS)])
def test_a_worker_that_hangs_holds_up_the_weights_of_the_others_for_a_bounded_time(fault, seconds):
    async def scenario():
        workers, spare = [FakeWorker() for _ in range(3)], FakeWorker()
        pool = await serving(workers, [spare])
        fault(workers[1])
        taken, _ = await seconds_until(pool.update_weights(handle(1)))
        assert taken <= seconds
        assert [worker.version for worker in workers] == [1, 0, 1]
        await asyncio.sleep(START_SECONDS + 1)
        assert workers[1].closed
        assert spare.version == 1
        assert "restarting" not in pool.states().values()

    run_virtually(scenario())


def test_claims_of_a_worker_that_hangs_all_come_back_at_once_and_it_is_replaced_once():
    async def scenario():
        hung, spare = FakeWorker(), FakeWorker()
        pool = await serving([hung], [spare], max_restarts=1)
        shut(hung)
        claims = [asyncio.ensure_future(pool.generate(request(str(i)))) for i in range(20)]
        await asyncio.sleep(1)
        hung.hangs = True
        taken, results = await seconds_until(asyncio.gather(*claims, return_exceptions=True))
        assert taken <= ANSWER_SECONDS
        assert all(isinstance(result, WorkerLost) for result in results)
        await pool.generate(request("again"))
        assert spare.requests == [("again", 0)]

    run_virtually(scenario())


def test_counters_are_those_of_the_workers_that_answer_in_time():
    async def scenario():
        workers, spare = [FakeWorker(), FakeWorker()], FakeWorker()
        pool = await serving(workers, [spare])
        workers[0].hangs = True
        taken, counters = await seconds_until(pool.counters())
        assert taken <= ANSWER_SECONDS
        assert counters == [{"num_tokens": 1.0}]
        await asyncio.sleep(START_SECONDS + 1)
        assert len(await pool.counters()) == 2

    run_virtually(scenario())


def test_a_worker_that_dies_before_there_are_weights_is_replaced_and_serves_the_first():
    async def scenario():
        first, spare = FakeWorker(), FakeWorker()
        pool = pool_of([first], [spare])
        first.dead = True
        await asyncio.sleep(ANSWER_SECONDS)
        await pool.update_weights(handle(0))
        await pool.generate(request("a"))
        assert spare.requests == [("a", 0)]

    run_virtually(scenario())


def test_one_that_hangs_once_too_often_says_what_to_do():
    async def scenario():
        worker = FakeWorker()
        pool = await serving([worker], max_restarts=0)
        worker.hangs = True
        with pytest.raises(WorkerLost):
            await pool.generate(request("a"))
        with pytest.raises(ClusterError, match="died once.*unanswered.*rollout.answer_seconds"):
            await pool.generate(request("b"))

    run_virtually(scenario())


def test_a_check_of_every_worker_goes_on_where_it_was_until_its_samples_are_finished():
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool = await serving(workers)
        shut(*workers)
        check = asyncio.ensure_future(pool.generate_everywhere(request("a")))
        await asyncio.sleep(CLAIM_SECONDS + 1)
        workers[1].gate.set()
        await asyncio.sleep(CLAIM_SECONDS)
        workers[0].gate.set()
        answers = await check
        assert [completion.is_finished for (completion,) in answers] == [True, True]
        assert [name for name, _ in workers[0].requests] == ["a.0", "a.1", "a.2"]
        assert [name for name, _ in workers[1].requests] == ["a.0", "a.1"]

    run_virtually(scenario())


def test_a_check_that_waits_for_its_worker_gives_up_with_it():
    async def scenario():
        worker, spare = FakeWorker(), FakeWorker()
        pool = await serving([worker], [spare], max_samples=1)
        shut(worker)
        claim = asyncio.ensure_future(pool.generate(request("a")))
        await asyncio.sleep(1)
        check = asyncio.ensure_future(pool.generate_everywhere(request("b")))
        await asyncio.sleep(1)
        worker.hangs = True
        assert await check == []
        await cancelled(claim)

    run_virtually(scenario())


def test_closing_ends_everything_and_replaces_nobody():
    async def scenario():
        workers, spare = [FakeWorker(), FakeWorker()], FakeWorker()
        pool = await serving(workers, [spare])
        shut(*workers)
        claim = asyncio.ensure_future(pool.generate(request("a")))
        await asyncio.sleep(1)
        await pool.close()
        with pytest.raises(WorkerLost):
            await claim
        await asyncio.sleep(10 * ANSWER_SECONDS)
        assert all(worker.closed for worker in workers)
        assert spare.version is None

    run_virtually(scenario())
