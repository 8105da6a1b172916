"""What a worker's drafter is told of: all that the others sampled, once, and beside its work."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

import numpy as np

from paceline.configs.vocabulary import Trace
from paceline.controller.drafts import exchange as trace_exchange
from paceline.controller.drafts.corpus import TraceArchive
from paceline.controller.drafts.exchange import TraceExchange
from tests.controller.builders import make_group
from tests.controller.engines.fake_workers import FakeWorker, handle, pool_of, request, tokens_of
from tests.controller.virtual_time import run_virtually


class Hands:
    """A channel that hands over blocks as they are; a closed gate holds what is published."""

    def __init__(self):
        self.kept = []
        self.num_published = 0
        self.broken = self.closed = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def publish(self, block):
        await self.gate.wait()
        if self.broken:
            raise ConnectionError("no route\nto host")
        self.num_published += 1
        self.kept.append(HandedBlock(block))
        return self.kept[-1]

    async def discard(self, place):
        self.kept.remove(place)

    async def close(self):
        self.closed = True


class HandedBlock:
    def __init__(self, block):
        self.block, self.forget_before = block, block.forget_before

    def read(self, reader):
        parts = self.block.traces.items()
        return [trace for origin, part in parts if origin != reader for trace in part]


def traces_of(prompt, completion, first):
    yield Trace(prompt, completion.versions[-1].version, completion.token_ids[first:])


def exchange_of(channel, max_tokens=10**6):
    return TraceExchange(TraceArchive(16, max_tokens), channel, traces_of, max_tokens)


def given(length, version=-1):
    return Trace((1,), version, np.zeros(length, np.int32))


def lengths(worker):
    """How long each trace is that it was told of."""
    return Counter(len(trace.token_ids) for trace in worker.known)


async def pool_and_exchange(workers, max_tokens=10**6, **settings):
    channel = Hands()
    exchange = exchange_of(channel, max_tokens)
    pool = pool_of(workers, exchange=exchange, **settings)
    await pool.update_weights(handle(0))
    await exchange.settled()
    return pool, exchange, channel


async def sample_on(pool, index, length, version=0):
    """Have one worker sample a completion of this length, as the pool sees it."""
    earlier = (tokens_of(length - 1, version, "abort"),)
    reader = pool._seats[index].reader
    assert reader is not None
    (completion,) = await pool._seats[index].worker._worker.generate(request("r", partial=earlier))
    reader.sampled(request("r"), (completion,))


def test_each_worker_is_told_what_the_others_sampled_and_once():
    async def scenario():
        workers = [FakeWorker() for _ in range(3)]
        pool, exchange, channel = await pool_and_exchange(workers)
        for version in range(1, 4):
            for index in range(3):
                await sample_on(pool, index, 10 * version + index)
            await pool.update_weights(handle(version))
            await exchange.settled()
        for index, worker in enumerate(workers):
            others = [10 * v + i for v in range(1, 4) for i in range(3) if i != index]
            assert lengths(worker) == Counter(others)
        assert channel.num_published == 3  # one for all workers, each step
        assert channel.kept == []

    run_virtually(scenario())


def test_what_is_sampled_through_the_pool_reaches_the_others():
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool, exchange, _ = await pool_and_exchange(workers)
        earlier = (tokens_of(4), tokens_of(30, reason="abort"))
        await pool.generate(request("r", num_samples=2, partial=earlier))
        await pool.update_weights(handle(1))
        await exchange.settled()
        (who_sampled,) = [worker for worker in workers if worker.requests]
        (other,) = [worker for worker in workers if not worker.requests]
        # only what this segment added: a finished sample came with the request
        assert lengths(other) == Counter([0, 1])
        assert who_sampled.known == []

    run_virtually(scenario())


def test_a_lone_worker_is_told_nothing_and_nothing_is_published():
    async def scenario():
        worker = FakeWorker()
        pool, exchange, channel = await pool_and_exchange([worker])
        for version in range(1, 4):
            await sample_on(pool, 0, version)
            await pool.update_weights(handle(version))
            await exchange.settled()
        assert worker.known == []
        assert channel.num_published == 0
        assert len(exchange.sampled()) == 3

    run_virtually(scenario())


def test_given_traces_reach_every_worker_before_anything_was_sampled():
    async def scenario():
        workers, channel = [FakeWorker(), FakeWorker()], Hands()
        exchange = exchange_of(channel)
        exchange.give([given(5), given(6), given(7, version=3)])
        pool = pool_of(workers, exchange=exchange)
        assert not channel.kept
        await pool.update_weights(handle(0))
        await exchange.settled()
        assert all(lengths(worker) == Counter([5, 6, 7]) for worker in workers)
        assert channel.num_published == 1
        assert channel.kept == []
        assert [len(trace.token_ids) for trace in exchange.sampled()] == [7]

    run_virtually(scenario())


def test_a_replacement_is_told_everything_and_then_only_news():
    async def scenario():
        first, second, spare = FakeWorker(), FakeWorker(), FakeWorker()
        pool, exchange, channel = await pool_and_exchange([first, second], spares=[spare])
        await sample_on(pool, 0, 10)
        await sample_on(pool, 1, 11)
        await pool.update_weights(handle(1))
        await sample_on(pool, 0, 12)
        second.dead = True
        await asyncio.sleep(100)  # found dead, and replaced
        await exchange.settled()
        assert lengths(spare) == Counter([10, 11, 12])
        await sample_on(pool, 0, 13)
        await sample_on(pool, 1, 14)
        await pool.update_weights(handle(2))
        await exchange.settled()
        assert lengths(spare) == Counter([10, 11, 12, 13])
        assert lengths(first) == Counter([11, 14])
        assert channel.kept == []

    run_virtually(scenario())


def test_an_update_does_not_wait_for_traces():
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool, exchange, channel = await pool_and_exchange(workers)
        channel.gate.clear()
        for version in range(1, 4):
            await sample_on(pool, 0, version)
            await pool.update_weights(handle(version))
        await pool.generate(request("r"))
        assert workers[1].known == []
        channel.gate.set()
        await exchange.settled()
        assert lengths(workers[1]) == Counter([1, 2, 3])

    run_virtually(scenario())


def test_a_long_archive_goes_in_blocks(monkeypatch):
    monkeypatch.setattr(trace_exchange, "BLOCK_TOKENS", 100)

    async def scenario():
        worker, channel = FakeWorker(), Hands()
        exchange = exchange_of(channel)
        exchange.give([given(30, version) for version in range(10)])
        pool = pool_of([worker], exchange=exchange)
        await pool.update_weights(handle(0))
        await exchange.settled()
        assert [trace.version for trace in worker.known] == list(range(10))
        assert channel.num_published == 3

    run_virtually(scenario())


def test_a_worker_that_hangs_over_traces_is_lost_and_holds_up_nobody():
    async def scenario():
        workers, spare = [FakeWorker(), FakeWorker()], FakeWorker()
        pool, exchange, channel = await pool_and_exchange(workers, spares=[spare])
        workers[1].stuck = True
        workers[1].gate.clear()
        await sample_on(pool, 0, 10)
        exchange.seal()
        pool._seats[1].reader.catch_up()
        pool._seats[0].reader.catch_up()
        await asyncio.sleep(1000)
        assert pool._seats[1].num_restarts == 1
        assert lengths(spare) == Counter([10])
        assert channel.kept == []

    run_virtually(scenario())


def test_slow_workers_miss_the_oldest_rather_than_have_everything_wait_for_them():
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool, exchange, channel = await pool_and_exchange(workers, max_tokens=25)
        channel.gate.clear()
        for _ in range(5):
            await sample_on(pool, 0, 10)
            exchange.seal()
        channel.gate.set()
        await pool.update_weights(handle(1))
        await exchange.settled()
        assert lengths(workers[1]) == Counter([10, 10])
        assert channel.kept == []

    run_virtually(scenario())


def test_a_channel_that_fails_costs_traces_and_one_line(caplog):
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool, exchange, channel = await pool_and_exchange(workers)
        channel.broken = True
        await sample_on(pool, 0, 10)
        await pool.update_weights(handle(1))
        await exchange.settled()
        channel.broken = False
        await sample_on(pool, 0, 11)
        await pool.update_weights(handle(2))
        await exchange.settled()
        assert lengths(workers[1]) == Counter([11])
        await pool.close()
        await exchange.close()
        assert channel.closed

    with caplog.at_level(logging.WARNING):
        run_virtually(scenario())
    (line,) = [record.getMessage() for record in caplog.records]
    assert "drafts without 10 tokens" in line and "no route to host" in line


def test_scores_are_no_samples():
    async def scenario():
        pool, exchange, _ = await pool_and_exchange([FakeWorker(), FakeWorker()])
        scoring = request("r", partial=(tokens_of(3),))
        scoring = scoring.__class__(**{**vars(scoring), "scores": True})
        await pool.generate(scoring)
        assert exchange.sampled() == []

    run_virtually(scenario())


def test_groups_of_the_ledger_are_recalled_unless_the_checkpoint_had_them():
    async def scenario():
        exchange = exchange_of(Hands())
        both, later = make_group(0, version=3), make_group(1, version=4)
        exchange.recall([both])
        exchange.recall([both, later])
        found = exchange.sampled()
        assert [trace.version for trace in found] == [3, 3, 4, 4]
        for trace, trajectory in zip(found, [*both.trajectories, *later.trajectories], strict=True):
            assert [*trace.prompt_token_ids, *trace.token_ids] == trajectory.token_ids.tolist()

    run_virtually(scenario())


def test_everybody_is_told_what_to_forget_a_lone_worker_too():
    async def scenario(num_workers):
        workers = [FakeWorker() for _ in range(num_workers)]
        pool, exchange, channel = await pool_and_exchange(workers)
        for version in range(3):
            await sample_on(pool, 0, 10 + version, version)
            await pool.update_weights(handle(version + 1))
        exchange.forget(2)
        assert [worker.forgotten for worker in workers] == [None] * num_workers
        await pool.update_weights(handle(4))
        await exchange.settled()
        assert [worker.forgotten for worker in workers] == [2] * num_workers
        assert [trace.version for trace in exchange.sampled()] == [2]
        assert channel.kept == []

    for num_workers in (1, 2):
        run_virtually(scenario(num_workers))


def test_who_comes_while_others_still_read_the_archive_is_told_what_came_since():
    async def scenario():
        channel, workers = Hands(), [FakeWorker(), FakeWorker()]
        exchange = exchange_of(channel)
        exchange.give([given(5)])
        channel.gate.clear()
        early, late = (exchange.admit(worker) for worker in workers)
        early.catch_up()
        await asyncio.sleep(0)
        early.sampled(request("r"), (tokens_of(6),))
        late.catch_up()
        await asyncio.sleep(0)
        channel.gate.set()
        await exchange.settled()
        assert lengths(workers[0]) == Counter([5])
        assert lengths(workers[1]) == Counter([5, 6])

    run_virtually(scenario())
