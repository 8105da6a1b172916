"""Workers under watch: whatever hangs, every call ends in its time, and the loss is told once."""

import asyncio
import time

import pytest

from paceline.controller.engines.watching import TimeLimits, WatchedWorker
from paceline.controller.groups.buffer import WorkerLost
from tests.controller.engines.fake_workers import (
    ANSWER_SECONDS,
    CLAIM_SECONDS,
    FakeWorker,
    handle,
    request,
)
from tests.controller.virtual_time import run_virtually

LIMITS = TimeLimits(CLAIM_SECONDS, ANSWER_SECONDS)


def watched(worker, limits=LIMITS):
    losses = []
    watch = WatchedWorker(worker, "rollout worker 3", limits, lambda: losses.append(watch.fate))
    return watch, losses


async def time_until_lost(*calls):
    """Seconds until all of them raised `WorkerLost`."""
    clock = asyncio.get_running_loop().time
    began = clock()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, WorkerLost) for result in results), results
    return clock() - began


def test_a_process_that_hangs_is_found_whatever_was_asked_of_it_and_fails_all_calls_at_once():
    async def scenario():
        worker = FakeWorker()
        worker.gate.clear()
        watch, losses = watched(worker)
        calls = [asyncio.ensure_future(watch.generate(request(str(i)))) for i in range(5)]
        await asyncio.sleep(1)
        worker.hangs = True
        calls.append(watch.update_weights(handle(0)))
        assert await time_until_lost(*calls) <= ANSWER_SECONDS
        assert await time_until_lost(watch.counters(), watch.generate(request("late"))) == 0
        assert losses == ["hangs, it left a sign of life unanswered for 2 s"]

    run_virtually(scenario())


def test_a_process_that_dies_idle_is_found_too():
    async def scenario():
        worker = FakeWorker()
        watch, losses = watched(worker)
        worker.dead = True
        await asyncio.sleep(ANSWER_SECONDS)
        assert losses == ["died"]
        with pytest.raises(WorkerLost, match="rollout worker 3 died"):
            await watch.counters()

    run_virtually(scenario())


def test_a_request_that_takes_too_long_is_answered_with_what_there_is():
    async def scenario():
        worker = FakeWorker()
        worker.gate.clear()
        watch, losses = watched(worker)
        began = asyncio.get_running_loop().time()
        answer = await watch.generate(request("a", 2))
        assert asyncio.get_running_loop().time() - began == CLAIM_SECONDS
        assert answer.overdue
        assert [each.finish_reason for each in answer.completions] == ["abort", "abort"]
        worker.gate.set()
        assert not (await watch.generate(request("b"))).overdue
        assert losses == []

    run_virtually(scenario())


def test_an_engine_that_is_stuck_in_a_living_process_is_lost_once_it_ignores_an_interrupt():
    async def scenario():
        worker = FakeWorker()
        watch, losses = watched(worker)
        worker.stuck = True
        assert await time_until_lost(watch.generate(request("a"))) == CLAIM_SECONDS + ANSWER_SECONDS
        assert losses == ["hangs, it left an interrupt unanswered for 4 s"]

    run_virtually(scenario())


def test_an_interrupt_that_is_answered_while_the_request_is_not_does_not_help():
    async def scenario():
        worker = FakeWorker()
        worker.gate.clear()
        watch, losses = watched(worker)

        async def pretend(request_id):
            return True

        worker.interrupt = pretend
        assert await time_until_lost(watch.generate(request("a"))) == CLAIM_SECONDS + ANSWER_SECONDS
        assert losses == ["hangs, it left an interrupted request unanswered for 4 s"]

    run_virtually(scenario())


def test_loading_weights_may_take_longer_than_a_sign_of_life_but_not_for_ever():
    async def scenario():
        worker = FakeWorker()
        watch, losses = watched(worker)
        update = worker.update_weights

        async def slow(published):
            await asyncio.sleep(10 * ANSWER_SECONDS)
            return await update(published)

        worker.update_weights = slow
        assert await watch.update_weights(handle(4)) == (4, 104)
        worker.stuck = True
        assert await time_until_lost(watch.update_weights(handle(5))) == CLAIM_SECONDS
        assert losses == ["hangs, it left a weight update unanswered for 60 s"]

    run_virtually(scenario())


def test_impatience_with_requests_is_not_impatience_with_weights():
    async def scenario():
        worker = FakeWorker()
        watch, losses = watched(worker, TimeLimits(0.5, ANSWER_SECONDS))
        worker.stuck = True
        assert await time_until_lost(watch.update_weights(handle(5))) == ANSWER_SECONDS
        assert losses == ["hangs, it left a weight update unanswered for 4 s"]

    run_virtually(scenario())


def test_an_interrupt_waits_for_the_weights_that_are_being_loaded():
    async def scenario():
        worker = FakeWorker()
        worker.gate.clear()
        watch, losses = watched(worker)
        sampling = asyncio.ensure_future(watch.generate(request("a")))
        await asyncio.sleep(CLAIM_SECONDS - 1)
        worker.stuck = True
        updating = asyncio.ensure_future(watch.update_weights(handle(1)))
        await asyncio.sleep(5 * ANSWER_SECONDS)
        assert not sampling.done() and not updating.done()
        assert losses == []
        updating.cancel()
        await watch.close()
        await time_until_lost(sampling)

    run_virtually(scenario())


def test_a_request_nobody_waits_for_any_more_is_taken_back():
    async def scenario():
        worker = FakeWorker()
        worker.gate.clear()
        watch, _ = watched(worker)
        call = asyncio.ensure_future(watch.generate(request("a")))
        await asyncio.sleep(1)
        call.cancel()
        await asyncio.sleep(1)
        assert worker.interrupted == ["a"]

    run_virtually(scenario())


def test_closing_ends_what_is_pending_and_tells_nobody_of_a_loss():
    async def scenario():
        worker = FakeWorker()
        worker.gate.clear()
        watch, losses = watched(worker)
        call = asyncio.ensure_future(watch.generate(request("a")))
        await asyncio.sleep(1)
        await watch.close()
        with pytest.raises(WorkerLost, match="was closed"):
            await call
        await asyncio.sleep(10 * ANSWER_SECONDS)
        assert worker.closed
        assert losses == []

    run_virtually(scenario())


def test_a_controller_that_stood_still_itself_takes_nobody_for_lost():
    async def scenario():
        worker = FakeWorker()
        counters = worker.counters

        async def over_a_network():
            await asyncio.sleep(0.02)
            for _ in range(10):
                await asyncio.sleep(0)
            return await counters()

        worker.counters = over_a_network
        watch, losses = watched(worker, TimeLimits(2.0, 1.0))
        for _ in range(2):
            asked = asyncio.ensure_future(watch.counters())
            await asyncio.sleep(0.01)
            time.sleep(1.2)
            assert await asked == {"num_tokens": 1.0}
        assert losses == []
        await watch.close()

    asyncio.run(scenario())
