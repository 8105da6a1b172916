"""The work buffer: prompts waiting, claimed and finished, never more than the freshness budget.

A group's life::

    admit -> WAITING -> claim -> CLAIMED -> finish -> FINISHED -> take -> (training) -> release
                 ^------ give_back ----|

An *entry* leaves the buffer at ``take``; its *slot* is held until ``release``, which happens when
the engines serve the weights trained on it, or at once when it was dropped.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from paceline.configs.vocabulary import Completion, Group, Prompt
from paceline.controller.groups.freshness import FreshnessBudget
from paceline.controller.ledger.events import Kind
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore


class State(Enum):
    """State of an entry."""

    WAITING = "waiting"
    CLAIMED = "claimed"
    FINISHED = "finished"


@dataclass(slots=True)
class Work:
    """One prompt to be sampled; ``group_id`` is its position in the feed and orders training.

    ``partial`` is what earlier turns left of every sample, empty before the first.
    """

    group_id: int
    prompt: Prompt
    state: State = State.WAITING
    group: Group | None = None
    partial: tuple[Completion, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of its samples, finished or not."""
        if self.group is not None:
            return self.group.num_bytes
        return sum(completion.num_bytes for completion in self.partial)


class WorkerLost(Exception):
    """The worker that held a claim is gone; the claim can be given to another."""


class WorkBuffer:
    """Bounded hand-over between feed, generate, assemble and sync, on one event loop.

    Admission waits for a slot below ``limit``, which a pacer may set below the budget's capacity.
    Claims wait where the samples in the buffer could outgrow ``max_bytes``: only groups that the
    collector may be waiting for, those in the window, are then sampled.

    Every wait ends when its condition holds or the buffer is closed; a closed buffer answers None.
    Each operation costs the same however many groups are in it, but for the heaps' logarithm.

    Example, P = 2 and S = 1, so 4 slots:

    >>> from paceline.controller.groups.freshness import freshness_budget
    >>> async def life_of_group_0() -> tuple[int, int]:
    ...     buffer = WorkBuffer(freshness_budget(groups_per_step=2, max_lag=1))
    ...     for position in range(4):
    ...         await buffer.admit(lambda: (position, Prompt("sum", "1+1=", (1, 2, 1, 3))))
    ...     work = await buffer.claim()
    ...     await buffer.finish(Group(work.group_id, work.prompt, ()))
    ...     await buffer.take()  # group 0 leaves for training; its slot is still held
    ...     held = buffer.occupancy()["slots"]
    ...     buffer.release((0,))  # engines serve the weights it was trained into
    ...     return held, buffer.occupancy()["slots"]
    >>> asyncio.run(life_of_group_0())
    (4, 3)
    """

    def __init__(
        self,
        budget: FreshnessBudget,
        journal: Journal | None = None,
        max_bytes: int = 1 << 30,
        group_bytes: int = 0,
    ) -> None:
        """Create an empty buffer.

        A group is taken to need ``group_bytes`` until a larger one has finished.
        """
        self._journal = journal or Journal(MemoryStore())
        self._budget = budget
        self._limit = budget.capacity
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._largest = group_bytes  # what another claim may turn out to be
        self._entries: OrderedDict[int, Work] = OrderedDict()
        self._slots: set[int] = set()
        self._in_training: set[int] = set()  # those of them that the learner took
        self._waiting: list[int] = []
        self._finished: list[int] = []
        self._feeders: deque[asyncio.Future[None]] = deque()
        self._claimers: deque[asyncio.Future[None]] = deque()
        self._takers: deque[asyncio.Future[None]] = deque()
        self._closed = False

    @property
    def limit(self) -> int:
        """Slots that may be held now; at most the budget's capacity."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        assert self._budget.groups_per_step <= limit <= self._budget.capacity
        self._limit = limit
        self._wake()

    def restore(self, works: Iterable[Work], slots: Iterable[int]) -> None:
        """Put recovered entries, waiting or finished, into an empty buffer, in order of their ids.

        ``slots`` are those of batches that are still to be trained. Together they may be more than
        the capacity: then nothing is admitted, and nothing sampled, until training made room. A
        group is thus never sampled with more than ``capacity - 1`` others before it.
        """
        assert not self._entries and not self._slots, "only an empty buffer is restored"
        self._slots.update(slots)
        for work in sorted(works, key=lambda work: work.group_id):
            assert work.state is not State.CLAIMED, "claims died with who held them"
            self._slots.add(work.group_id)
            self._entries[work.group_id] = work
            heap = self._waiting if work.state is State.WAITING else self._finished
            heapq.heappush(heap, work.group_id)
            self._num_bytes += work.num_bytes

    async def admit(self, draw: Callable[[], tuple[int, Prompt]]) -> Work | None:
        """Wait for a free slot, then draw a (position, prompt) and let it in.

        Drawn only once it can be admitted, so that a checkpoint's cursor never counts a prompt
        that no entry holds. Positions must grow: they are the order of training.
        """
        await self._wait(self._feeders, self._has_room)
        if self._closed:
            return None
        work = Work(*draw())
        self._journal.note(Kind.ADMITTED, work.group_id, {"prompt": work.prompt.id})
        self._slots.add(work.group_id)
        self._entries[work.group_id] = work
        heapq.heappush(self._waiting, work.group_id)
        self._wake()
        return work

    async def claim(self) -> Work | None:
        """Wait for a waiting entry; the oldest becomes the caller's."""
        await self._wait(self._claimers, self._may_claim)
        if self._closed:
            return None
        work = self._entries[heapq.heappop(self._waiting)]
        self._journal.note(Kind.CLAIMED, work.group_id)
        work.state = State.CLAIMED
        self._wake()
        return work

    def give_back(
        self, work: Work, partial: tuple[Completion, ...] | None = None, reason: str = "worker_lost"
    ) -> None:
        """Return a claim that was not carried out, with what was sampled: it waits again."""
        assert work.state is State.CLAIMED, f"group {work.group_id} is {work.state.value}"
        self._journal.note(Kind.RETURNED, work.group_id, {"reason": reason})
        if partial is not None:
            self._num_bytes -= work.num_bytes
            work.partial = partial
            self._num_bytes += work.num_bytes
        work.state = State.WAITING
        heapq.heappush(self._waiting, work.group_id)
        self._wake()

    async def finish(self, group: Group) -> None:
        """Hand in a claimed group, sampled and graded: it counts once the ledger has it."""
        work = self._entries[group.group_id]
        assert work.state is State.CLAIMED and work.group is None, (
            f"group {group.group_id} is {work.state.value}"
        )
        self._num_bytes += group.num_bytes - work.num_bytes
        self._largest = max(self._largest, group.num_bytes)
        work.group, work.partial = group, ()
        versions = {"oldest": group.oldest_version, "newest": group.newest_version}
        await self._journal.write(Kind.FINISHED, group.group_id, versions, group=group)
        work.state = State.FINISHED
        heapq.heappush(self._finished, group.group_id)
        self._wake()

    async def take(self) -> Group | None:
        """Wait for a finished group among the ``window`` oldest admissions; it leaves the buffer.

        The window is anchored at the oldest entry: taking a younger one does not move it, so a slow
        group is overtaken at most ``window - 1`` times.
        """
        await self._wait(self._takers, self._may_take)
        if self._closed:
            return None
        work = self._entries.pop(heapq.heappop(self._finished))
        self._num_bytes -= work.num_bytes
        self._wake()
        return work.group

    def begin_training(self, group_ids: tuple[int, ...]) -> None:
        """Count slots as those of a batch that the learner took, until they are released."""
        assert self._slots.issuperset(group_ids), "a batch holds its slots until it is released"
        self._in_training.update(group_ids)

    def release(self, group_ids: tuple[int, ...]) -> None:
        """Free the slots of groups that were dropped, or whose weights the engines now serve."""
        for group_id in group_ids:
            self._slots.remove(group_id)
        self._in_training.difference_update(group_ids)
        self._wake()

    def close(self) -> None:
        """End every wait; nothing is admitted, claimed or taken afterwards."""
        self._closed = True
        self._wake()

    def unreleased(self) -> tuple[int, ...]:
        """Return ids of groups whose slot is held, ascending: a resumed run must do them again."""
        return tuple(sorted(self._slots))

    def occupancy(self) -> dict[str, int]:
        """Return entries by state, slots held, those of them that are in training, and slots that
        may be held now.
        """
        waiting, finished = len(self._waiting), len(self._finished)
        return {
            State.WAITING.value: waiting,
            State.CLAIMED.value: len(self._entries) - waiting - finished,
            State.FINISHED.value: finished,
            "slots": len(self._slots),
            "training": len(self._in_training),
            "limit": self._limit,
        }

    @property
    def num_bytes(self) -> int:
        """Size of the samples it holds, finished or not."""
        return self._num_bytes

    def _has_room(self) -> bool:
        return len(self._slots) < self._limit

    def _may_claim(self) -> bool:
        if not self._waiting or len(self._slots) > self._budget.capacity:
            return False
        if self._waiting[0] < self._window_end():
            return True
        claimed = len(self._entries) - len(self._waiting) - len(self._finished)
        return self._num_bytes + (claimed + 1) * self._largest <= self._max_bytes

    def _may_take(self) -> bool:
        return bool(self._finished) and self._finished[0] < self._window_end()

    def _window_end(self) -> int:
        return next(iter(self._entries)) + self._budget.window

    async def _wait(
        self, queue: deque[asyncio.Future[None]], condition: Callable[[], bool]
    ) -> None:
        """Wait for one's turn: until the condition holds for the first in the queue."""
        while not self._closed and not condition():
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._wake()  # the waiter whose turn it was left: the next one's, then
                raise

    def _wake(self) -> None:
        """Let those at the heads of the queues look again; all of them at the end."""
        for queue, condition in (
            (self._feeders, self._has_room),
            (self._claimers, self._may_claim),
            (self._takers, self._may_take),
        ):
            while queue and (self._closed or condition()):
                turn = queue.popleft()
                if not turn.done():
                    turn.set_result(None)
                    if not self._closed:
                        break
