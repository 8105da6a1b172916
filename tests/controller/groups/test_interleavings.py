"""Any order of events: no group is trained too old, nothing is stuck, nobody is overtaken for ever.

Hypothesis chooses what happens next: admissions, claims, results, deaths, partial results, drops,
training and the engines' updates, with no regard to what is likely. The model beside the buffer
counts versions; the buffer's own rules are all that keeps ages down.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from paceline.controller.groups.buffer import WorkBuffer
from paceline.controller.groups.freshness import FreshnessBudget, freshness_budget
from paceline.controller.ledger.events import Kind
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from tests.controller.builders import make_completion, make_group, make_prompt


class Blocked(Exception):
    """The operation would have to wait."""


EVENT_LOOP = asyncio.new_event_loop()


def now(coroutine):
    """The result of an operation that does not have to wait."""

    async def first_turn():
        task = asyncio.ensure_future(coroutine)
        await asyncio.sleep(0)
        if not task.done():
            task.cancel()
            raise Blocked
        return task.result()

    return EVENT_LOOP.run_until_complete(first_turn())


class Interleavings(RuleBasedStateMachine):
    @initialize(
        groups=st.integers(1, 4), lag=st.integers(0, 3), window=st.sampled_from([0.0, 0.3, 0.8])
    )
    def begin(self, groups, lag, window):
        self.start(freshness_budget(groups, lag, window))
        assert self.budget.max_age == lag

    def start(self, budget: FreshnessBudget):
        self.budget = budget
        self.journal = Journal(MemoryStore())
        self.buffer = WorkBuffer(budget, self.journal)
        self.positions = itertools.count()
        self.claimed = []
        self.collected = []  # taken for the next step
        self.steps = []  # trained, their weights not yet served
        self.served = 0
        self.next_step = 0
        self.passed = {}  # group id: younger groups trained while it was in the buffer
        self.waiting_ids = set()

    # what can happen

    @rule()
    def admit(self):
        with contextlib.suppress(Blocked):
            work = now(self.buffer.admit(self.draw))
            self.passed[work.group_id] = 0

    def draw(self):
        position = next(self.positions)
        return position, make_prompt(position)

    @precondition(lambda self: self.buffer.occupancy()["waiting"])
    @rule()
    def claim(self):
        work = now(self.buffer.claim())
        # Its first token is of the version that is served now.
        self.claimed.append((work, self.served))

    @precondition(lambda self: self.claimed)
    @rule(data=st.data())
    def finish(self, data):
        work, version = self.claimed.pop(data.draw(st.integers(0, len(self.claimed) - 1)))
        versions = [version, *(c.versions[0].version for c in work.partial)]
        now(self.buffer.finish(make_group(work.group_id, version=min(versions))))

    @precondition(lambda self: self.claimed)
    @rule(data=st.data(), partial=st.booleans())
    def give_back(self, data, partial):
        """A worker dies, or a segment ends with part of the group sampled."""
        work, version = self.claimed.pop(data.draw(st.integers(0, len(self.claimed) - 1)))
        oldest = min([version, *(c.versions[0].version for c in work.partial)])
        self.buffer.give_back(work, (make_completion(oldest),) if partial else None)

    @precondition(lambda self: self.claimed)
    @rule(limit=st.integers(0, 100))
    def pace(self, limit):
        lowest = self.budget.groups_per_step
        self.buffer.limit = max(lowest, min(limit, self.budget.capacity))

    @rule(dropped=st.booleans())
    def take(self, dropped):
        try:
            group = now(self.buffer.take())
        except Blocked:
            return
        del self.passed[group.group_id]
        if dropped:
            self.journal.note(Kind.SET_ASIDE, group.group_id, {"reason": "zero_signal"})
            self.buffer.release((group.group_id,))
            return
        for other in self.passed:
            if other < group.group_id:
                self.passed[other] += 1
        self.collected.append(group)
        if len(self.collected) == self.budget.groups_per_step:
            self.train()

    def train(self):
        ages = [self.next_step - group.oldest_version for group in self.collected]
        bound = (self.budget.capacity + self.budget.window - 2) // self.budget.groups_per_step
        assert max(ages) <= bound, f"age {max(ages)} of {bound}"
        self.steps.append(tuple(group.group_id for group in self.collected))
        self.next_step += 1
        self.collected = []

    @precondition(lambda self: self.steps)
    @rule()
    def serve(self):
        self.served += 1
        self.buffer.release(self.steps.pop(0))

    # what must hold

    def has_room(self):
        return self.buffer.occupancy()["slots"] < self.buffer.limit

    @invariant()
    def nobody_is_overtaken_by_more_than_the_window(self):
        if hasattr(self, "budget"):
            assert max(self.passed.values(), default=0) <= self.budget.window - 1

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "budget"):
            in_buffer = set(self.passed)
            training = {i for step in self.steps for i in step}
            collected = {group.group_id for group in self.collected}
            assert set(self.buffer.unreleased()) == in_buffer | training | collected

    def teardown(self):
        """From any state work goes on: with workers that answer, step after step is trained."""
        if not hasattr(self, "budget"):
            return
        self.buffer.limit = self.budget.capacity
        oldest, goal = min(self.passed, default=-1), self.next_step + 3
        for _ in range(10_000):
            if self.next_step >= goal:
                break
            while self.steps:
                self.serve()
            while self.has_room():
                self.admit()
            while self.buffer.occupancy()["waiting"]:
                self.claim()
            while self.claimed:
                work, version = self.claimed.pop()
                versions = [version, *(c.versions[0].version for c in work.partial)]
                now(self.buffer.finish(make_group(work.group_id, version=min(versions))))
            self.take(dropped=False)
        assert self.next_step >= goal, "a deadlock"
        assert oldest not in self.passed, "the oldest group starved"


Interleavings.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_any_interleaving = Interleavings.TestCase
