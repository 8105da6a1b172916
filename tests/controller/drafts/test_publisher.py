"""Distribution of draft text: all that the others sampled, once, and beside a worker's work."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections import Counter

import numpy as np

from paceline.configs.vocabulary import DraftText
from paceline.controller.drafts import publisher as draft_publisher
from paceline.controller.drafts.corpus import DraftCorpus
from paceline.controller.drafts.publisher import DraftPublisher
from paceline.spec.draft_text import OVERLAP_TOKENS
from tests.controller.builders import make_group
from tests.controller.engines.fake_workers import FakeWorker, handle, pool_of, request, tokens_of
from tests.controller.virtual_time import run_virtually


class ObjectStore:
    """Hands over blocks as they are, and keeps them while referenced; a closed gate holds them."""

    def __init__(self):
        self._objects = weakref.WeakSet()
        self.num_published = 0
        self.broken = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def put(self, block):
        await self.gate.wait()
        if self.broken:
            raise ConnectionError("no route\nto host")
        self.num_published += 1
        stored = StoredBlock(block)
        self._objects.add(stored)
        return stored

    @property
    def kept(self):
        """The blocks that somebody still refers to."""
        gc.collect()
        return list(self._objects)


class StoredBlock:
    def __init__(self, block):
        self.block, self.drop_before = block, block.drop_before

    def read(self, subscriber):
        parts = self.block.texts.items()
        return [text for origin, part in parts if origin != subscriber for text in part]


def publisher_of(store, max_tokens=10**6):
    return DraftPublisher(DraftCorpus(16, max_tokens), store.put, max_tokens)


def draft_text(length, version=-1):
    return DraftText((1,), version, np.zeros(1 + length, np.int32))


def lengths(worker):
    """Number of tokens of each text it was sent, without the one token of the prompt."""
    return Counter(len(text.token_ids) - 1 for text in worker.known)


async def pool_and_publisher(workers, max_tokens=10**6, **settings):
    store = ObjectStore()
    publisher = publisher_of(store, max_tokens)
    pool = pool_of(workers, draft_publisher=publisher, **settings)
    await pool.update_weights(handle(0))
    await publisher.settled()
    return pool, publisher, store


async def sample_on(pool, index, length, version=0):
    """Have one worker sample a completion of this length, as the pool sees it."""
    earlier = (tokens_of(length - 1, version, "abort"),)
    subscription = pool._seats[index].subscription
    assert subscription is not None
    (completion,) = await pool._seats[index].worker._worker.generate(request("r", partial=earlier))
    subscription.add_sampled(request("r"), (completion,))


def test_each_worker_gets_what_the_others_sampled_and_once():
    async def scenario():
        workers = [FakeWorker() for _ in range(3)]
        pool, publisher, store = await pool_and_publisher(workers)
        for version in range(1, 4):
            for index in range(3):
                await sample_on(pool, index, 10 * version + index)
            await pool.update_weights(handle(version))
            await publisher.settled()
        for index, worker in enumerate(workers):
            others = [10 * v + i for v in range(1, 4) for i in range(3) if i != index]
            assert lengths(worker) == Counter(others)
        assert store.num_published == 3  # one for all workers, each step
        assert store.kept == []

    run_virtually(scenario())


def test_what_is_sampled_through_the_pool_reaches_the_others():
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool, publisher, _ = await pool_and_publisher(workers)
        earlier = (tokens_of(4), tokens_of(30, reason="abort"))
        await pool.generate(request("r", num_samples=2, partial=earlier))
        await pool.update_weights(handle(1))
        await publisher.settled()
        (who_sampled,) = [worker for worker in workers if worker.requests]
        (other,) = [worker for worker in workers if not worker.requests]
        # what this segment added, behind what it is matched by; a finished sample added nothing
        (text,) = other.known
        assert text.token_ids.tolist() == list(range(30 - OVERLAP_TOKENS, 31))
        assert who_sampled.known == []

    run_virtually(scenario())


def test_a_lone_worker_gets_nothing_and_nothing_is_published():
    async def scenario():
        worker = FakeWorker()
        pool, publisher, store = await pool_and_publisher([worker])
        for version in range(1, 4):
            await sample_on(pool, 0, version)
            await pool.update_weights(handle(version))
            await publisher.settled()
        assert worker.known == []
        assert store.num_published == 0
        assert len(publisher.sampled_texts()) == 3

    run_virtually(scenario())


def test_preloaded_texts_reach_every_worker_before_anything_was_sampled():
    async def scenario():
        workers, store = [FakeWorker(), FakeWorker()], ObjectStore()
        publisher = publisher_of(store)
        publisher.preload([draft_text(5), draft_text(6), draft_text(7, version=3)])
        pool = pool_of(workers, draft_publisher=publisher)
        assert not store.kept
        await pool.update_weights(handle(0))
        await publisher.settled()
        assert all(lengths(worker) == Counter([5, 6, 7]) for worker in workers)
        assert store.num_published == 1
        assert store.kept == []
        assert [len(text.token_ids) for text in publisher.sampled_texts()] == [8]

    run_virtually(scenario())


def test_a_replacement_gets_everything_and_then_only_what_is_new():
    async def scenario():
        first, second, spare = FakeWorker(), FakeWorker(), FakeWorker()
        pool, publisher, store = await pool_and_publisher([first, second], spares=[spare])
        await sample_on(pool, 0, 10)
        await sample_on(pool, 1, 11)
        await pool.update_weights(handle(1))
        await sample_on(pool, 0, 12)
        second.dead = True
        await asyncio.sleep(100)  # found dead, and replaced
        await publisher.settled()
        assert lengths(spare) == Counter([10, 11, 12])
        await sample_on(pool, 0, 13)
        await sample_on(pool, 1, 14)
        await pool.update_weights(handle(2))
        await publisher.settled()
        assert lengths(spare) == Counter([10, 11, 12, 13])
        assert lengths(first) == Counter([11, 14])
        assert store.kept == []

    run_virtually(scenario())


def test_an_update_does_not_wait_for_draft_text():
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool, publisher, store = await pool_and_publisher(workers)
        store.gate.clear()
        for version in range(1, 4):
            await sample_on(pool, 0, version)
            await pool.update_weights(handle(version))
        await pool.generate(request("r"))
        assert workers[1].known == []
        store.gate.set()
        await publisher.settled()
        assert lengths(workers[1]) == Counter([1, 2, 3])

    run_virtually(scenario())


def test_a_long_corpus_goes_in_blocks(monkeypatch):
    monkeypatch.setattr(draft_publisher, "BLOCK_TOKENS", 100)

    async def scenario():
        worker, store = FakeWorker(), ObjectStore()
        publisher = publisher_of(store)
        publisher.preload([draft_text(30, version) for version in range(10)])
        pool = pool_of([worker], draft_publisher=publisher)
        await pool.update_weights(handle(0))
        await publisher.settled()
        assert [text.version for text in worker.known] == list(range(10))
        assert store.num_published == 3

    run_virtually(scenario())


def test_a_worker_that_hangs_over_draft_text_is_lost_and_holds_up_no_other():
    async def scenario():
        workers, spare = [FakeWorker(), FakeWorker()], FakeWorker()
        pool, publisher, store = await pool_and_publisher(workers, spares=[spare])
        workers[1].stuck = True
        workers[1].gate.clear()
        await sample_on(pool, 0, 10)
        publisher.publish()
        pool._seats[1].subscription.start_delivery()
        pool._seats[0].subscription.start_delivery()
        await asyncio.sleep(1000)
        assert pool._seats[1].num_restarts == 1
        assert lengths(spare) == Counter([10])
        assert store.kept == []

    run_virtually(scenario())


def test_slow_workers_miss_the_oldest_rather_than_have_everything_wait_for_them():
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool, publisher, store = await pool_and_publisher(workers, max_tokens=25)
        store.gate.clear()
        for _ in range(5):
            await sample_on(pool, 0, 10)
            publisher.publish()
        store.gate.set()
        await pool.update_weights(handle(1))
        await publisher.settled()
        assert lengths(workers[1]) == Counter([10, 10])
        assert store.kept == []

    run_virtually(scenario())


def test_a_store_that_fails_costs_drafts_and_one_line(caplog):
    async def scenario():
        workers = [FakeWorker(), FakeWorker()]
        pool, publisher, store = await pool_and_publisher(workers)
        store.broken = True
        await sample_on(pool, 0, 10)
        await pool.update_weights(handle(1))
        await publisher.settled()
        store.broken = False
        await sample_on(pool, 0, 11)
        await pool.update_weights(handle(2))
        await publisher.settled()
        assert lengths(workers[1]) == Counter([11])
        await pool.close()

    with caplog.at_level(logging.WARNING):
        run_virtually(scenario())
    (line,) = [record.getMessage() for record in caplog.records]
    assert "drafts without 11 tokens" in line and "no route to host" in line


def test_scores_are_no_samples():
    async def scenario():
        pool, publisher, _ = await pool_and_publisher([FakeWorker(), FakeWorker()])
        scoring = request("r", partial=(tokens_of(3),))
        scoring = scoring.__class__(**{**vars(scoring), "scores": True})
        await pool.generate(scoring)
        assert publisher.sampled_texts() == []

    run_virtually(scenario())


def test_groups_of_the_ledger_are_preloaded_unless_the_checkpoint_had_them():
    async def scenario():
        publisher = publisher_of(ObjectStore())
        both, later = make_group(0, version=3), make_group(1, version=4)
        publisher.preload_groups([both])
        publisher.preload_groups([both, later])
        found = publisher.sampled_texts()
        assert [text.version for text in found] == [3, 3, 4, 4]
        for text, sample in zip(found, [*both.samples, *later.samples], strict=True):
            whole = [*both.prompt.token_ids, *sample.completion.token_ids]
            assert text.token_ids.tolist() == whole

    run_virtually(scenario())


def test_every_worker_is_told_what_to_drop_a_lone_one_too():
    async def scenario(num_workers):
        workers = [FakeWorker() for _ in range(num_workers)]
        pool, publisher, store = await pool_and_publisher(workers)
        for version in range(3):
            await sample_on(pool, 0, 10 + version, version)
            await pool.update_weights(handle(version + 1))
        publisher.drop_before(2)
        assert [worker.dropped_before for worker in workers] == [None] * num_workers
        await pool.update_weights(handle(4))
        await publisher.settled()
        assert [worker.dropped_before for worker in workers] == [2] * num_workers
        assert [text.version for text in publisher.sampled_texts()] == [2]
        assert store.kept == []

    for num_workers in (1, 2):
        run_virtually(scenario(num_workers))


def test_a_worker_that_joins_while_others_read_the_corpus_gets_what_came_since():
    async def scenario():
        store, workers = ObjectStore(), [FakeWorker(), FakeWorker()]
        publisher = publisher_of(store)
        publisher.preload([draft_text(5)])
        store.gate.clear()
        early, late = (publisher.subscribe(worker) for worker in workers)
        early.start_delivery()
        await asyncio.sleep(0)
        early.add_sampled(request("r"), (tokens_of(6),))
        late.start_delivery()
        await asyncio.sleep(0)
        store.gate.set()
        await publisher.settled()
        assert lengths(workers[0]) == Counter([5])
        assert lengths(workers[1]) == Counter([5, 6])

    run_virtually(scenario())
