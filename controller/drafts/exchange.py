"""What each worker's drafter is told of: what the others sampled, what was given, what was saved.

The pool tells the exchange what was sampled, and on whose engine. At each weight boundary that
becomes a block, which is published once (`trace_channels`) and read by every other worker; a worker
that comes later, the first ones among them, gets the whole archive instead. All of it happens in
tasks of its own: no update, request or step waits for it. What fails costs drafts, nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from paceline.configs.vocabulary import Completion, Group, RolloutRequest, Trace
from paceline.controller.drafts.blocks import Block, TraceChannel
from paceline.controller.drafts.corpus import TraceArchive
from paceline.controller.groups.buffer import WorkerLost

logger = logging.getLogger(__name__)

BLOCK_TOKENS = 1 << 18
"""Of a block, about: a worker is told of a mebibyte at a time."""
GIVEN = -1
"""The origin of traces that no worker sampled."""

TracesOf = Callable[[tuple[int, ...], Completion, int], Iterable[Trace]]
"""Traces of what a completion got from a token on."""


class Pupil(Protocol):
    """A worker, as far as it can be told of traces."""

    async def learn(self, block: Any, reader: int) -> None:
        """Read a published block, and draft from what is in it; `WorkerLost` as ever."""


@dataclass(frozen=True)
class PublishedBlock:
    """A block that was published, and its place once it is there."""

    number: int
    origins: frozenset[int]
    num_tokens: int
    place: asyncio.Task[Any]

    def concerns(self, reader: int) -> bool:
        """Whether there is something in it that the reader does not know."""
        return bool(self.origins - {reader})


@dataclass(frozen=True)
class News:
    """Blocks that a reader does not know; with them it knows all up to number ``position``."""

    blocks: Sequence[PublishedBlock]
    position: int


class Reader:
    """A worker's time at the exchange; ``position`` is the last block it knows."""

    def __init__(self, exchange: TraceExchange, pupil: Pupil, name: int) -> None:
        self.name = name
        self.position: int | None = None
        self._exchange = exchange
        self._pupil = pupil
        self._lesson: asyncio.Task[None] | None = None

    def sampled(self, request: RolloutRequest, completions: Sequence[Completion]) -> None:
        """Its engine answered a request: what that added to each sample is news to the others."""
        if not request.scores:
            self._exchange.take(self.name, request, completions)

    def catch_up(self) -> None:
        """Tell the worker, in the background, of all it does not know yet."""
        if self._lesson is None or self._lesson.done():
            self._lesson = asyncio.create_task(self._learn(), name=f"traces for {self.name}")

    async def caught_up(self) -> None:
        """Wait until it knows all, or is lost."""
        if self._lesson is not None:
            await asyncio.wait((self._lesson,))

    def leave(self) -> None:
        """The worker is gone."""
        if self._lesson is not None:
            self._lesson.cancel()
        self._exchange.dismiss(self)

    async def _learn(self) -> None:
        with contextlib.suppress(WorkerLost):
            while news := self._exchange.news_for(self):
                for block in news.blocks:
                    if block.concerns(self.name):
                        await self._read(block)
                self.position = news.position
                self._exchange.trim()

    async def _read(self, block: PublishedBlock) -> None:
        try:
            await self._pupil.learn(await asyncio.shield(block.place), self.name)
        except WorkerLost:
            raise
        except Exception as error:  # the channel's, here or in the worker
            reason = " ".join(str(error).split())[:200]
            logger.warning(
                "a rollout worker drafts without %d tokens sampled by others: they did not reach "
                "it (%s)",
                block.num_tokens,
                reason,
            )


class TraceExchange:
    """Between the pool, which says what was sampled where, and the readers, one for each worker.

    ``max_tokens`` is the most that waits for slow readers: beyond it they miss the oldest block.
    """

    def __init__(
        self, archive: TraceArchive, channel: TraceChannel, traces_of: TracesOf, max_tokens: int
    ) -> None:
        self._archive = archive
        self._channel = channel
        self._traces_of = traces_of
        self._max_tokens = max_tokens
        self._readers: list[Reader] = []
        self._names = itertools.count()
        self._fresh: defaultdict[int, list[Trace]] = defaultdict(list)
        self._forget_before: int | None = None
        self._blocks: deque[PublishedBlock] = deque()
        self._head = 0
        self._whole: list[PublishedBlock] | None = None  # the archive as it is
        self._wholes: list[PublishedBlock] = []  # and as it was, where it may still be read
        self._errands: set[asyncio.Task[None]] = set()

    def admit(self, pupil: Pupil) -> Reader:
        """A worker that knows nothing yet."""
        reader = Reader(self, pupil, next(self._names))
        self._readers.append(reader)
        return reader

    def dismiss(self, reader: Reader) -> None:
        """A reader that asks for nothing any more."""
        if reader in self._readers:
            self._readers.remove(reader)
            self.trim()

    def give(self, traces: Iterable[Trace]) -> None:
        """Traces that no worker has sampled; before the first worker comes."""
        self._archive.add(traces)
        self._whole = None

    def recall(self, groups: Iterable[Group]) -> None:
        """Groups from before an interruption, known or not; before the first worker comes."""
        self._archive.add_missing(
            trace
            for group in groups
            for sample in group.samples
            for trace in self._traces_of(group.prompt.token_ids, sample.completion, 0)
        )
        self._whole = None

    def take(self, origin: int, request: RolloutRequest, completions: Sequence[Completion]) -> None:
        """What a request's turn added on one worker."""
        known = [len(each.token_ids) for each in request.partial] or [0] * len(completions)
        traces = [
            trace
            for completion, first in zip(completions, known, strict=True)
            for trace in self._traces_of(request.prompt_token_ids, completion, first)
        ]
        self._archive.add(traces)
        if any(reader.name != origin for reader in self._readers):
            self._fresh[origin] += traces
        self._whole = None

    def forget(self, before: int) -> None:
        """Have nobody draft from older versions any more, from the next weight boundary on."""
        self._archive.forget(before)
        self._forget_before = before
        self._whole = None

    def seal(self) -> None:
        """Publish what was sampled since the last time, and somebody does not know."""
        fresh, self._fresh = self._fresh, defaultdict(list)
        before, self._forget_before = self._forget_before, None
        blocks: list[Block] = []
        if before is not None:
            blocks.append(Block({GIVEN: ()}, before))
        blocks += in_blocks(fresh.items())
        for block in blocks:
            self._head += 1
            self._blocks.append(self._published(block))
        waiting = sum(block.num_tokens for block in self._blocks)
        while waiting > self._max_tokens:
            waiting -= self._blocks[0].num_tokens
            self._discard(self._blocks.popleft())

    def news_for(self, reader: Reader) -> News | None:
        """What a reader does not know: new blocks, or the archive where it knows nothing."""
        if reader.position is None:
            self.seal()
            if self._whole is None:
                self._whole = list(map(self._published, in_blocks([(GIVEN, self._archive)])))
                self._wholes += self._whole
            return News(self._whole, self._head)
        blocks = [block for block in self._blocks if block.number > reader.position]
        return News(blocks, blocks[-1].number) if blocks else None

    def trim(self) -> None:
        """Discard what all readers know."""
        positions = [reader.position for reader in self._readers]
        known = min((each for each in positions if each is not None), default=self._head)
        while self._blocks and self._blocks[0].number <= known:
            self._discard(self._blocks.popleft())
        if None not in positions:
            for block in self._wholes:
                self._discard(block)
            self._wholes, self._whole = [], None

    async def settled(self) -> None:
        """Wait until every worker that was told to catch up has."""
        await asyncio.gather(*(reader.caught_up() for reader in self._readers))

    def sampled(self) -> list[Trace]:
        """All that is kept of what was sampled, the oldest version first."""
        return [trace for trace in self._archive if trace.version >= 0]

    async def close(self) -> None:
        """Leave nothing behind; nobody reads any more."""
        for errand in self._errands:
            errand.cancel()
        await self._channel.close()

    def _published(self, block: Block) -> PublishedBlock:
        place = asyncio.create_task(self._channel.publish(block))
        return PublishedBlock(self._head, frozenset(block.traces), block.num_tokens, place)

    def _discard(self, block: PublishedBlock) -> None:
        async def discard() -> None:
            with contextlib.suppress(Exception):  # what was not published, readers have told of
                await self._channel.discard(await block.place)

        errand = asyncio.create_task(discard())
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)


def in_blocks(traces: Iterable[tuple[int, Iterable[Trace]]]) -> Iterator[Block]:
    """Traces by origin, in order, in blocks of about ``BLOCK_TOKENS`` tokens."""
    block: defaultdict[int, list[Trace]] = defaultdict(list)
    size = 0
    for origin, of_origin in traces:
        for trace in of_origin:
            block[origin].append(trace)
            size += len(trace.token_ids)
            if size >= BLOCK_TOKENS:
                yield Block(block)
                block, size = defaultdict(list), 0
    if block:
        yield Block(block)
