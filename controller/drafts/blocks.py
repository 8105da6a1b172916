"""How blocks of traces get from the controller to the workers: Ray's object store, or Redis.

Either way the controller publishes a block once, and hands every worker something small to read it
by: a worker reads a block itself, off its engine's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
import redis

from paceline.configs.vocabulary import Trace

Pack = Callable[[Sequence[Trace]], bytes]
Unpack = Callable[[bytes, str], list[Trace]]

SOCKET_TIMEOUT_SECONDS = 30.0
KEEP_SECONDS = 3600
"""How long a stream outlives the last block that was added: a worker reads one within seconds."""


@dataclass(frozen=True)
class Block:
    """Traces by the reader who knows them already: the one whose engine sampled them.

    With ``forget_before`` all readers are to forget what older versions sampled.
    """

    traces: Mapping[int, Sequence[Trace]]
    forget_before: int | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens there are to be learned."""
        return sum(len(trace.token_ids) for traces in self.traces.values() for trace in traces)

    def packed(self, pack: Pack) -> dict[int, bytes]:
        """The traces of each origin in one piece."""
        return {origin: pack(traces) for origin, traces in self.traces.items()}


class TraceChannel(Protocol):
    """Where blocks are kept until every worker has read them."""

    async def publish(self, block: Block) -> Any:
        """Keep a block; what comes back, sent to a worker, arrives there as a block to read."""

    async def discard(self, place: Any) -> None:
        """Nobody will ask for this block any more."""

    async def close(self) -> None:
        """Leave nothing behind."""


@dataclass(frozen=True)
class PackedBlock:
    """A block's bytes, where they are at hand."""

    parts: Mapping[int, bytes]
    unpack: Unpack
    forget_before: int | None

    def read(self, reader: int) -> list[Trace]:
        """All traces but the reader's own."""
        parts = (part for origin, part in self.parts.items() if origin != reader)
        return [trace for part in parts for trace in self.unpack(part, "a block of traces")]


class RayChannel:
    """Blocks are objects of Ray's store: workers on one machine share one copy."""

    def __init__(self, pack: Pack, unpack: Unpack) -> None:
        self._pack = pack
        self._unpack = unpack

    async def publish(self, block: Block) -> Any:
        """A reference, which Ray resolves where it is an argument of an actor's call."""

        def put() -> Any:
            return ray.put(PackedBlock(block.packed(self._pack), self._unpack, block.forget_before))

        return await asyncio.to_thread(put)

    async def discard(self, place: Any) -> None:
        """Ray keeps an object for as long as there is a reference."""

    async def close(self) -> None:
        """See ``discard``."""


@dataclass(frozen=True)
class StreamAddress:
    """A stream of a Redis."""

    url: str
    password: str | None = field(repr=False)
    key: str

    def connect(self) -> Any:
        """A client; it connects when it is used."""
        return redis.Redis.from_url(
            self.url, password=self.password, socket_timeout=SOCKET_TIMEOUT_SECONDS
        )


@dataclass(frozen=True)
class StreamedBlock:
    """A block that is an entry of a stream."""

    address: StreamAddress
    entry_id: bytes
    unpack: Unpack
    forget_before: int | None

    def read(self, reader: int) -> list[Trace]:
        """All traces but the reader's own; none where the entry is gone."""
        with contextlib.closing(self.address.connect()) as client:
            entries = client.xrange(self.address.key, self.entry_id, self.entry_id)
        parts = {int(origin): part for _, fields in entries for origin, part in fields.items()}
        return PackedBlock(parts, self.unpack, self.forget_before).read(reader)


class RedisChannel:
    """Blocks are entries of a stream ``paceline:NAME:traces:…``, a field for each origin.

    The stream is the controller's own, and expires where that is killed.
    """

    def __init__(
        self, url: str, password: str | None, name: str, pack: Pack, unpack: Unpack
    ) -> None:
        self._address = StreamAddress(url, password, f"paceline:{name}:traces:{uuid.uuid4().hex}")
        self._client = self._address.connect()
        self._pack = pack
        self._unpack = unpack

    async def publish(self, block: Block) -> StreamedBlock:
        """Add an entry."""

        def add() -> bytes:
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.xadd(self._address.key, block.packed(self._pack))
                pipeline.expire(self._address.key, KEEP_SECONDS)
                entry_id, _ = pipeline.execute()
            return bytes(entry_id)

        entry_id = await asyncio.to_thread(add)
        return StreamedBlock(self._address, entry_id, self._unpack, block.forget_before)

    async def discard(self, place: StreamedBlock) -> None:
        """Delete the entry."""
        with contextlib.suppress(redis.RedisError):  # it expires
            await asyncio.to_thread(self._client.xdel, self._address.key, place.entry_id)

    async def close(self) -> None:
        """Delete the stream."""
        with contextlib.suppress(redis.RedisError):
            await asyncio.to_thread(self._client.delete, self._address.key)
        self._client.close()
