"""Blocks of traces reach other processes unchanged, over Ray and over Redis alike."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import redis

from paceline.configs.vocabulary import Trace
from paceline.controller.actors import kill, start_actor
from paceline.controller.drafts.blocks import KEEP_SECONDS, Block, RayChannel, RedisChannel
from paceline.controller.engines.worker_actor import RolloutActor
from paceline.spec.trace_file import pack, unpack
from tests.redis_server import RedisServer

pytestmark = pytest.mark.slow

TRACES = {
    0: [
        Trace((1, 2), 3, np.arange(5, dtype=np.int32)),
        Trace((1, 2), -1, np.arange(2, dtype="i4")),
    ],
    7: [Trace((), 4, np.arange(100_000, dtype=np.int32))],
}

BLOCK = Block(TRACES, forget_before=3)


@pytest.fixture(scope="module")
def worker(local_ray):
    """An actor that repeats what it was told of."""

    class Listener:
        async def learn(self, block, reader):
            assert block.forget_before == 3
            self.learned = await asyncio.to_thread(block.read, reader)

        def told(self):
            return self.learned

    actor = start_actor(Listener, cpus=0, gpus=0, environment={})
    yield RolloutActor(actor, 0)
    kill(actor)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(params=["ray", "redis"])
def channel(request):
    if request.param == "ray":
        return RayChannel(pack, unpack)
    return RedisChannel(request.getfixturevalue("server").url, None, "test", pack, unpack)


async def read(worker, place, reader):
    await worker.learn(place, reader)
    return await worker._actor.told.remote()


def test_a_worker_reads_all_but_its_own(channel, worker):
    async def scenario():
        place = await channel.publish(BLOCK)
        for reader, origins in [(0, [7]), (7, [0]), (1, [0, 7])]:
            expected = [trace for origin in origins for trace in TRACES[origin]]
            found = await read(worker, place, reader)
            assert [(t.prompt_token_ids, t.version) for t in found] == [
                (t.prompt_token_ids, t.version) for t in expected
            ]
            for one, other in zip(found, expected, strict=True):
                assert one.token_ids.dtype == np.int32
                assert np.array_equal(one.token_ids, other.token_ids)
        await channel.discard(place)
        await channel.close()

    asyncio.run(scenario())


def test_a_stream_holds_what_was_not_discarded_and_ends_with_its_controller(server):
    async def scenario():
        channel = RedisChannel(server.url, None, "run", pack, unpack)
        first, second = [await channel.publish(BLOCK) for _ in range(2)]
        (key,) = server.client().keys("paceline:run:traces:*")
        assert 0 < server.client().ttl(key) <= KEEP_SECONDS
        await channel.discard(first)
        assert first.read(1) == []
        assert len(second.read(1)) == 3
        assert server.client().xlen(key) == 1
        await channel.close()
        assert server.client().keys("paceline:run:*") == []

    asyncio.run(scenario())


def test_a_redis_that_is_gone_raises_for_the_exchange_to_tell(server):
    channel = RedisChannel("redis://127.0.0.1:1/0", "secret", "run", pack, unpack)
    with pytest.raises(redis.ConnectionError):
        asyncio.run(channel.publish(BLOCK))
    asyncio.run(channel.close())
    assert "secret" not in repr(channel._address)
