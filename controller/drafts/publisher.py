"""Distribution of draft text: what other workers sampled, what files hold, what was saved.

The pool reports to the publisher what was sampled, and on which worker. At each weight boundary
that becomes a block, which is published once (`blocks`) and read by every other worker; a new
worker, the first ones included, gets the whole corpus instead. All of it happens in tasks of its
own: no update, request or step waits for it. A failure costs drafts, nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from paceline.configs.vocabulary import Completion, DraftText, Group, RolloutRequest
from paceline.controller.drafts.blocks import Block
from paceline.controller.drafts.corpus import DraftCorpus
from paceline.controller.groups.buffer import WorkerLost
from paceline.spec.draft_text import sampled_texts

logger = logging.getLogger(__name__)

BLOCK_TOKENS = 1 << 18
"""Tokens of a block, about: a worker reads a mebibyte at a time."""
NO_SUBSCRIBER = -1
"""The origin of texts that every subscriber is to read."""

PutBlock = Callable[[Block], Coroutine[Any, Any, Any]]
"""Keeps a block while its result is referenced; sent to a worker, that arrives there as a block."""


class Subscriber(Protocol):
    """A worker whose engine drafts."""

    async def add_draft_text(self, block: Any, subscriber: int) -> None:
        """Read a published block, and draft from its texts; `WorkerLost` as for other calls."""


@dataclass(frozen=True)
class PublishedBlock:
    """A block that was published; ``reference`` resolves once it can be read."""

    number: int
    origins: frozenset[int]
    num_tokens: int
    reference: asyncio.Task[Any]

    def is_for(self, subscriber: int) -> bool:
        """Return whether it holds anything that the subscriber's own engine did not sample."""
        return bool(self.origins - {subscriber})


@dataclass(frozen=True)
class Unread:
    """Blocks that a subscriber has not read; with them it has all up to number ``position``."""

    blocks: Sequence[PublishedBlock]
    position: int


class Subscription:
    """One worker's subscription; ``position`` is the number of the last block it has read."""

    def __init__(self, publisher: DraftPublisher, subscriber: Subscriber, name: int) -> None:
        self.name = name
        self.position: int | None = None
        self._publisher = publisher
        self._subscriber = subscriber
        self._delivery: asyncio.Task[None] | None = None

    def add_sampled(self, request: RolloutRequest, completions: Sequence[Completion]) -> None:
        """Take the answer of the worker's engine to a request, for the other workers."""
        if not request.scores:
            self._publisher.add_sampled(self.name, request, completions)

    def start_delivery(self) -> None:
        """Have the worker read, in the background, all blocks it has not read yet."""
        if self._delivery is None or self._delivery.done():
            self._delivery = asyncio.create_task(
                self._deliver(), name=f"draft text for {self.name}"
            )

    async def delivered(self) -> None:
        """Wait until the worker has read all, or is lost."""
        if self._delivery is not None:
            await asyncio.wait((self._delivery,))

    def cancel(self) -> None:
        """End the subscription of a worker that is gone."""
        if self._delivery is not None:
            self._delivery.cancel()
        self._publisher.unsubscribe(self)

    async def _deliver(self) -> None:
        with contextlib.suppress(WorkerLost):
            while unread := self._publisher.unread_by(self):
                for block in unread.blocks:
                    if block.is_for(self.name):
                        await self._deliver_block(block)
                self.position = unread.position
                self._publisher.discard_read()

    async def _deliver_block(self, block: PublishedBlock) -> None:
        try:
            reference = await asyncio.shield(block.reference)
            await self._subscriber.add_draft_text(reference, self.name)
        except WorkerLost:
            raise
        except Exception as error:  # the store's, here or in the worker
            reason = " ".join(str(error).split())[:200]
            logger.warning(
                "a rollout worker drafts without %d tokens sampled by others: they did not reach "
                "it (%s)",
                block.num_tokens,
                reason,
            )


class DraftPublisher:
    """Publisher of sampled text to subscribed workers, and of the corpus to new ones.

    ``max_tokens`` is the most that waits for slow workers: beyond it they miss the oldest block.
    """

    def __init__(self, corpus: DraftCorpus, put_block: PutBlock, max_tokens: int) -> None:
        self._corpus = corpus
        self._put_block = put_block
        self._max_tokens = max_tokens
        self._subscriptions: list[Subscription] = []
        self._names = itertools.count()
        self._unpublished: defaultdict[int, list[DraftText]] = defaultdict(list)
        self._drop_before: int | None = None
        self._blocks: deque[PublishedBlock] = deque()
        self._num_published = 0
        self._corpus_blocks: list[PublishedBlock] | None = None  # the corpus as it is now

    def subscribe(self, subscriber: Subscriber) -> Subscription:
        """Return the subscription of a worker that has read nothing yet."""
        subscription = Subscription(self, subscriber, next(self._names))
        self._subscriptions.append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Remove a subscription, and what only its worker had still to read."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
            self.discard_read()

    def preload(self, texts: Iterable[DraftText]) -> None:
        """Add texts from files or a checkpoint, before the first worker subscribes."""
        self._corpus.add(texts)
        self._corpus_blocks = None

    def preload_groups(self, groups: Iterable[Group]) -> None:
        """Add the ledger's groups that the checkpoint lacks, before the first worker subscribes."""
        self._corpus.add_missing(
            text
            for group in groups
            for sample in group.samples
            for text in sampled_texts(group.prompt.token_ids, sample.completion)
        )
        self._corpus_blocks = None

    def add_sampled(
        self, origin: int, request: RolloutRequest, completions: Sequence[Completion]
    ) -> None:
        """Add the tokens that one worker's segments appended to a request's samples."""
        earlier = [len(each.token_ids) for each in request.partial] or [0] * len(completions)
        texts = [
            text
            for completion, first in zip(completions, earlier, strict=True)
            for text in sampled_texts(request.prompt_token_ids, completion, first)
        ]
        self._corpus.add(texts)
        if any(subscription.name != origin for subscription in self._subscriptions):
            self._unpublished[origin] += texts
        self._corpus_blocks = None

    def drop_before(self, version: int) -> None:
        """Have all workers drop texts of older versions, from the next weight boundary on."""
        self._corpus.drop_before(version)
        self._drop_before = version
        self._corpus_blocks = None

    def publish(self) -> None:
        """Publish what was sampled since the last call and some worker has not."""
        unpublished, self._unpublished = self._unpublished, defaultdict(list)
        drop_before, self._drop_before = self._drop_before, None
        blocks: list[Block] = []
        if drop_before is not None:
            blocks.append(Block({NO_SUBSCRIBER: ()}, drop_before))
        blocks += in_blocks(unpublished.items())
        for block in blocks:
            self._num_published += 1
            self._blocks.append(self._published(block))
        waiting = sum(block.num_tokens for block in self._blocks)
        while waiting > self._max_tokens:
            waiting -= self._blocks.popleft().num_tokens

    def unread_by(self, subscription: Subscription) -> Unread | None:
        """Return the blocks a worker has not read: new ones, or the corpus if it has read none."""
        if subscription.position is None:
            self.publish()
            if self._corpus_blocks is None:
                corpus = in_blocks([(NO_SUBSCRIBER, self._corpus)])
                self._corpus_blocks = list(map(self._published, corpus))
            return Unread(self._corpus_blocks, self._num_published)
        blocks = [block for block in self._blocks if block.number > subscription.position]
        return Unread(blocks, blocks[-1].number) if blocks else None

    def discard_read(self) -> None:
        """Let go of the blocks that all workers have read."""
        positions = [subscription.position for subscription in self._subscriptions]
        read = min((each for each in positions if each is not None), default=self._num_published)
        while self._blocks and self._blocks[0].number <= read:
            self._blocks.popleft()
        if None not in positions:
            self._corpus_blocks = None

    async def settled(self) -> None:
        """Wait until all deliveries that were started have ended."""
        await asyncio.gather(*(each.delivered() for each in self._subscriptions))

    def sampled_texts(self) -> list[DraftText]:
        """Return all texts of the corpus that engines sampled, the oldest version first."""
        return [text for text in self._corpus if text.version >= 0]

    def _published(self, block: Block) -> PublishedBlock:
        reference = asyncio.create_task(self._put_block(block))
        # Readers of a block get its error; asyncio is not to report that of one dropped unread.
        reference.add_done_callback(lambda task: task.cancelled() or task.exception())
        return PublishedBlock(
            self._num_published, frozenset(block.texts), block.num_tokens, reference
        )


def in_blocks(texts: Iterable[tuple[int, Iterable[DraftText]]]) -> Iterator[Block]:
    """Yield texts by origin, in order, in blocks of about ``BLOCK_TOKENS`` tokens."""
    block: defaultdict[int, list[DraftText]] = defaultdict(list)
    size = 0
    for origin, of_origin in texts:
        for text in of_origin:
            block[origin].append(text)
            size += len(text.token_ids)
            if size >= BLOCK_TOKENS:
                yield Block(block)
                block, size = defaultdict(list), 0
    if block:
        yield Block(block)
