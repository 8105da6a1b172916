"""The engine's thread: updates between steps, failures reach every caller."""

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from paceline.configs.errors import DataError
from paceline.configs.vocabulary import (
    DraftText,
    RolloutRequest,
    SamplingParameters,
    WeightVersion,
)
from paceline.controller.engines.pool import WorkerPool
from paceline.controller.engines.watching import TimeLimits
from paceline.rollout.engine import RolloutResult
from paceline.rollout.engine_thread import DRAFT_TOKENS_PER_STEP, EngineThread
from paceline.rollout.worker import RolloutWorker
from paceline.weights_sync.handle import WeightHandle, WeightSyncError
from paceline.weights_sync.layout import Layout
from tests.controller.builders import make_completion


class FakeEngine:
    """Finishes each request after ``steps`` steps, with the version it then has.

    Its updates give back what is running where ``aborts`` is set.
    """

    def __init__(self, steps=3, aborts=False):
        self.version, self.checksum = None, None
        self.steps, self.broken, self.aborts = steps, None, aborts
        self.running = {}
        self.threads = set()
        self.in_step = False
        self.num_steps = 0
        self.added = []
        self.dropped = None

    def add(self, request):
        if not request.prompt_token_ids:
            raise DataError("empty prompt")
        self.running[request.request_id] = self.steps

    def step(self):
        self.threads.add(threading.get_ident())
        self.in_step = True
        self.num_steps += 1
        time.sleep(0.002)
        if self.broken:
            raise self.broken
        self.running = {name: left - 1 for name, left in self.running.items()}
        done = [name for name, left in self.running.items() if left == 0]
        for name in done:
            del self.running[name]
        self.in_step = False
        return [RolloutResult(name, (make_completion(self.version),)) for name in done]

    @property
    def draft_counters(self):
        return {"num_drafted": 2}

    def has_work(self):
        return bool(self.running)

    def interrupt(self, request_id):
        assert not self.in_step
        if self.running.pop(request_id, None) is None:
            return None
        return RolloutResult(request_id, (replace(make_completion(0), finish_reason="abort"),))

    def update_weights(self, handle):
        assert not self.in_step
        if handle.checksum < 0:
            raise OSError("torn")
        self.num_added_at_update = len(self.added)
        self.version, self.checksum = handle.version, handle.checksum
        return [self.interrupt(name) for name in list(self.running)] if self.aborts else []

    def drop_draft_text(self, before):
        assert not self.in_step
        self.dropped = before, len(self.added)

    def add_draft_text(self, texts):
        assert not self.in_step
        if any(text.version < 0 for text in texts):
            raise MemoryError("out of memory")
        self.threads.add(threading.get_ident())
        self.added.append((self.num_steps, tuple(texts)))
        time.sleep(0.001)


def handle(version, checksum=0):
    return WeightHandle(WeightVersion(version), "", checksum, Layout(()))


def text(length, version=0):
    return DraftText((1,), version, np.zeros(length, np.int32))


def request(name, prompt=(1,)):
    return RolloutRequest(name, prompt, SamplingParameters(), 1, seed=0)


@pytest.fixture
def engine_and_thread():
    engine = FakeEngine()
    thread = EngineThread(lambda: engine)
    thread.ready.result(5)
    thread.update_weights(handle(0)).result(5)
    yield engine, thread
    thread.close()


def test_requests_and_updates_interleave_on_one_thread(engine_and_thread):
    engine, thread = engine_and_thread
    futures = []
    for version in range(1, 20):
        futures.append(thread.generate(request(f"r{version}")))
        futures.append(thread.update_weights(handle(version)))
    for future in futures:
        future.result(5)
    assert len(engine.threads) == 1
    assert engine.version == 19


def test_an_unservable_request_fails_alone(engine_and_thread):
    _, thread = engine_and_thread
    bad, good = thread.generate(request("bad", ())), thread.generate(request("good"))
    with pytest.raises(DataError):
        bad.result(5)
    assert len(good.result(5)) == 1


def test_an_engine_that_breaks_fails_what_is_pending_and_all_that_comes(engine_and_thread):
    engine, thread = engine_and_thread
    engine.broken = MemoryError("out of memory")
    with pytest.raises(MemoryError):
        thread.generate(request("pending")).result(5)
    with pytest.raises(MemoryError):
        thread.generate(request("later")).result(5)


def test_an_update_that_fails_ends_the_engine_rather_than_serving_old_weights(engine_and_thread):
    _, thread = engine_and_thread
    with pytest.raises(OSError, match="torn"):
        thread.update_weights(handle(1, checksum=-1)).result(5)
    with pytest.raises(OSError, match="torn"):
        thread.generate(request("later")).result(5)


def test_an_engine_that_cannot_be_built_says_why():
    def build():
        raise DataError("no such model")

    with pytest.raises(DataError, match="no such model"):
        EngineThread(build).ready.result(5)


def test_without_weights_nothing_is_served():
    thread = EngineThread(FakeEngine)
    with pytest.raises(AssertionError, match="never given weights"):
        thread.generate(request("early")).result(5)
    thread.close()


def test_an_interrupted_request_is_answered_with_what_it_has_and_the_others_go_on():
    async def scenario():
        worker = RolloutWorker(lambda: FakeEngine(steps=200))
        await worker.update_weights(handle(0))
        taken = asyncio.create_task(worker.generate(request("taken")))
        stays = asyncio.create_task(worker.generate(request("stays")))
        await asyncio.sleep(0.02)
        assert await worker.interrupt("taken") is True
        (completion,) = await asyncio.wait_for(taken, 1)
        assert not completion.is_finished
        assert await worker.interrupt("taken") is False
        assert not stays.done()
        assert (await stays)[0].is_finished
        await worker.close()

    asyncio.run(scenario())


def test_an_update_that_aborts_answers_every_request_and_is_acknowledged():
    async def scenario():
        worker = RolloutWorker(lambda: FakeEngine(steps=10**9, aborts=True))
        await worker.update_weights(handle(0))
        calls = [asyncio.create_task(worker.generate(request(f"r{i}"))) for i in range(5)]
        await asyncio.sleep(0.02)
        assert await worker.update_weights(handle(1, checksum=77)) == (1, 77)
        for (completion,) in await asyncio.wait_for(asyncio.gather(*calls), 1):
            assert completion.finish_reason == "abort"
        await worker.close()

    asyncio.run(scenario())


class StubbornEngine(FakeEngine):
    """Says nothing of an update and goes on with the version it has."""

    def update_weights(self, handle):
        return [] if self.version is not None else super().update_weights(handle)


class MisreadingEngine(FakeEngine):
    """Takes an update from other bytes than those announced."""

    def update_weights(self, handle):
        results = super().update_weights(handle)
        self.checksum = handle.checksum ^ 1
        return results


@pytest.mark.parametrize(
    ("engine", "found"),
    [
        (StubbornEngine, "version 0 with checksum 0000000000000007, expected 1"),
        (MisreadingEngine, "version 0 with checksum 0000000000000006, expected 0"),
    ],
)
def test_the_pool_hears_what_the_engine_found_and_refuses_other_weights(engine, found):
    async def scenario():
        worker = RolloutWorker(engine)
        await worker.ready()
        limits = TimeLimits(claim_seconds=5, answer_seconds=5)
        pool = WorkerPool([worker], None, max_restarts=0, max_samples=8, limits=limits)
        try:
            for version in range(2):
                await pool.update_weights(handle(version, checksum=7))
        finally:
            await pool.close()

    with pytest.raises(WeightSyncError, match=found):
        asyncio.run(scenario())


def test_only_tokens_of_this_turn_are_counted():
    thread = EngineThread(FakeEngine)
    thread.update_weights(handle(0)).result(5)
    earlier = make_completion(0, length=3)
    thread.generate(replace(request("r"), partial=(earlier,))).result(5)
    assert thread.counters.num_tokens == 4 - 3
    thread.close()


def test_a_caller_that_gave_up_does_not_stop_the_engine(engine_and_thread):
    _, thread = engine_and_thread
    assert thread.generate(request("given up")).cancel()
    assert len(thread.generate(request("later")).result(5)) == 1


def test_draft_text_is_added_in_order_a_part_between_two_steps_each(engine_and_thread):
    engine, thread = engine_and_thread
    engine.steps = 10**9
    thread.generate(request("long"))
    texts = [text(DRAFT_TOKENS_PER_STEP // 2 - 1, version) for version in range(9)] + [
        text(10**5, 9)
    ]
    thread.add_draft_text(texts).result(5)
    assert len(engine.threads) == 1
    assert [each.version for _, part in engine.added for each in part] == list(range(10))
    sizes = [sum(len(each.token_ids) for each in part) for _, part in engine.added]
    assert all(size <= DRAFT_TOKENS_PER_STEP for size in sizes[:-1])
    assert len(sizes) == 6  # two at a time; the last, which is too long for any part, alone
    steps = [num_steps for num_steps, _ in engine.added]
    assert len(set(steps)) == len(steps)
    assert thread.counters.num_draft_text_tokens == sum(sizes)


def test_an_idle_engine_adds_texts_too_and_an_update_waits_for_one_part_at_most(
    engine_and_thread,
):
    engine, thread = engine_and_thread
    addition = thread.add_draft_text(
        [text(DRAFT_TOKENS_PER_STEP, version) for version in range(50)]
    )
    thread.update_weights(handle(1)).result(5)
    addition.result(5)
    assert engine.num_added_at_update < len(engine.added) == 50
    assert engine.num_steps == 0


def test_an_engine_that_breaks_over_a_draft_text_fails_all_that_are_pending(engine_and_thread):
    _, thread = engine_and_thread
    additions = [thread.add_draft_text([text(1, version=-1)]), thread.add_draft_text([text(1)])]
    for addition in additions:
        with pytest.raises(MemoryError):
            addition.result(5)


def test_a_worker_reads_draft_text_beside_its_engine_and_answers_when_it_is_added():
    class Block:
        drop_before = 2

        def read(self, subscriber):
            self.thread = threading.get_ident()
            return [text(subscriber)]

    async def scenario():
        engine, block = FakeEngine(), Block()
        worker = RolloutWorker(lambda: engine)
        await worker.add_draft_text(block, 3)
        ((_, (added,)),) = engine.added
        assert len(added.token_ids) == 3
        assert engine.dropped == (2, 0)
        assert block.thread not in {threading.get_ident(), *engine.threads}
        await worker.close()

    asyncio.run(scenario())
