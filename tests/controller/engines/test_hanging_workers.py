"""The worker pool: what slow and hanging workers hold up, and for how long; the end."""

import asyncio

import pytest

from paceline.configs.errors import ClusterError
from paceline.controller.groups.buffer import WorkerLost
from tests.controller.engines.fake_workers import (
    ANSWER_SECONDS,
    CLAIM_SECONDS,
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


def test_what_a_slow_worker_had_for_too_long_goes_on_elsewhere():
    async def scenario():
        slow, other = FakeWorker(), FakeWorker()
        pool = await serving([slow, other])
        shut(slow)
        taken, completions = await seconds_until(pool.generate(request("a", 2)))
        assert taken == CLAIM_SECONDS
        assert not any(completion.is_finished for completion in completions)
        turn = request("b", 2, partial=completions)
        taken, completions = await seconds_until(pool.generate(turn))
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
