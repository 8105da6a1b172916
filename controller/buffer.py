"""The work buffer: prompts waiting, claimed and finished, never more than the freshness budget.

A group's life::

    admit -> WAITING -> claim -> CLAIMED -> finish -> FINISHED -> take -> (training) -> release
                 ^------ give_back ----|

An *entry* leaves the buffer at ``take``; its *slot* is held until ``release``, which happens when
the engines serve the weights trained on it, or at once when it was dropped.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from paceline.configs.vocabulary import Group, Prompt
from paceline.controller.freshness import FreshnessBudget


class State(Enum):
    """Where an entry stands."""

    WAITING = "waiting"
    CLAIMED = "claimed"
    FINISHED = "finished"


@dataclass
class Work:
    """One prompt to be sampled; ``group_id`` is its position in the feed and orders training."""

    group_id: int
    prompt: Prompt
    state: State = State.WAITING
    group: Group | None = None


class WorkBuffer:
    """Bounded hand-over between feed, generate, assemble and sync, on one event loop.

    Every wait ends when its condition holds or the buffer is closed; a closed buffer answers None.

    Example, P = 2 and S = 1, so 4 slots::

        for prompt in four: await buffer.admit(prompt)     # 4 / 4 slots
        await buffer.finish(group0)                        # still 4 / 4
        await buffer.take()                                # group0 leaves; its slot is still held
        buffer.release((0,))                               # its weights are served: 3 / 4
    """

    def __init__(self, budget: FreshnessBudget) -> None:
        self._budget = budget
        self._entries: OrderedDict[int, Work] = OrderedDict()
        self._slots: set[int] = set()
        self._changed = asyncio.Condition()
        self._closed = False

    async def admit(self, draw: Callable[[], tuple[int, Prompt]]) -> Work | None:
        """Wait for a free slot, then draw a (position, prompt) and let it in.

        Drawn only once it can be admitted, so that a checkpoint's cursor never counts a prompt
        nobody holds. Positions must grow: they are the order of training.
        """
        async with self._changed:
            await self._wait_for(lambda: len(self._slots) < self._budget.capacity)
            if self._closed:
                return None
            work = Work(*draw())
            self._slots.add(work.group_id)
            self._entries[work.group_id] = work
            self._changed.notify_all()
            return work

    async def claim(self) -> Work | None:
        """Wait for a waiting entry; the oldest becomes the caller's."""
        async with self._changed:
            await self._wait_for(lambda: self._oldest_waiting() is not None)
            work = self._oldest_waiting()
            if self._closed or work is None:
                return None
            work.state = State.CLAIMED
            return work

    async def give_back(self, work: Work) -> None:
        """Return a claim that could not be carried out; somebody else will claim it."""
        async with self._changed:
            assert work.state is State.CLAIMED, f"group {work.group_id} is {work.state.value}"
            work.state = State.WAITING
            self._changed.notify_all()

    async def finish(self, group: Group) -> None:
        """Hand in a claimed group, sampled and graded."""
        async with self._changed:
            work = self._entries[group.group_id]
            assert work.state is State.CLAIMED, f"group {group.group_id} is {work.state.value}"
            work.state, work.group = State.FINISHED, group
            self._changed.notify_all()

    async def take(self) -> Group | None:
        """Wait for a finished group among the ``window`` oldest admissions; it leaves the buffer.

        The window is anchored at the oldest entry: taking a younger one does not move it, so a slow
        group is overtaken at most ``window - 1`` times.
        """
        async with self._changed:
            await self._wait_for(lambda: self._next_finished() is not None)
            work = self._next_finished()
            if self._closed or work is None:
                return None
            del self._entries[work.group_id]
            self._changed.notify_all()
            return work.group

    async def release(self, group_ids: tuple[int, ...]) -> None:
        """Free the slots of groups that were dropped, or whose weights the engines now serve."""
        async with self._changed:
            for group_id in group_ids:
                self._slots.remove(group_id)
            self._changed.notify_all()

    async def close(self) -> None:
        """End every wait; nothing is admitted, claimed or taken afterwards."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    def unreleased(self) -> tuple[int, ...]:
        """Ids of groups whose slot is held, ascending: what a resumed run must do again."""
        return tuple(sorted(self._slots))

    def occupancy(self) -> dict[str, int]:
        """Entries by state, and slots held."""
        states = Counter(work.state.value for work in self._entries.values())
        return {state.value: states[state.value] for state in State} | {"slots": len(self._slots)}

    async def _wait_for(self, condition: Callable[[], bool]) -> None:
        await self._changed.wait_for(lambda: self._closed or condition())

    def _oldest_waiting(self) -> Work | None:
        waiting = (work for work in self._entries.values() if work.state is State.WAITING)
        return next(waiting, None)

    def _next_finished(self) -> Work | None:
        if not self._entries:
            return None
        end = next(iter(self._entries)) + self._budget.window
        for work in self._entries.values():
            if work.group_id >= end:
                return None
            if work.state is State.FINISHED:
                return work
        return None
