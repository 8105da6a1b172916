"""Blocks of draft text reach other processes unchanged, over Ray's object store."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from paceline.configs.vocabulary import DraftText
from paceline.controller.cluster.actors import kill, start_actor
from paceline.controller.drafts.blocks import Block, put_block
from paceline.controller.engines.worker_actor import RolloutActor

TEXTS = {
    0: [
        DraftText((1, 2), 3, np.arange(5, dtype=np.int32)),
        DraftText((1, 2), -1, np.arange(2, dtype="i4")),
    ],
    7: [DraftText((), 4, np.arange(100_000, dtype=np.int32))],
}


@pytest.fixture(scope="module")
def worker(local_ray):
    """An actor that returns what it read."""

    class Listener:
        async def add_draft_text(self, block, subscriber):
            assert block.drop_before == 3
            self.added = await asyncio.to_thread(block.read, subscriber)

        def last(self):
            return self.added

    actor = start_actor(Listener, cpus=0, gpus=0, environment={})
    yield RolloutActor(actor, 0)
    kill(actor)


@pytest.mark.parametrize(("subscriber", "origins"), [(0, [7]), (7, [0]), (1, [0, 7])])
def test_a_worker_reads_all_but_its_own(worker, subscriber, origins):
    async def scenario():
        reference = await put_block(Block(TEXTS, drop_before=3))
        await worker.add_draft_text(reference, subscriber)
        expected = [text for origin in origins for text in TEXTS[origin]]
        found = await worker._actor.last.remote()
        assert [(t.prompt_token_ids, t.version) for t in found] == [
            (t.prompt_token_ids, t.version) for t in expected
        ]
        for one, other in zip(found, expected, strict=True):
            assert one.token_ids.dtype == np.int32
            assert np.array_equal(one.token_ids, other.token_ids)

    asyncio.run(scenario())
