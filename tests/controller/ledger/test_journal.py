"""The journal: in order, in groups, durable before it says so, and never silent about a failure."""

from __future__ import annotations

import asyncio
import threading

import pytest

from paceline.controller.groups.buffer import WorkBuffer
from paceline.controller.groups.freshness import FreshnessBudget
from paceline.controller.ledger.events import Kind, LedgerError
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from tests.controller.builders import make_group, make_prompt


class SlowStore(MemoryStore):
    """Appends when it is let; remembers what came in one piece."""

    survives = True

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.commits = []

    def append(self, records):
        assert self.gate.wait(10)
        self.commits.append([record.key for record in records])
        super().append(records)


class BrokenStore(MemoryStore):
    survives = True

    def append(self, records):
        raise LedgerError("the disk is full")


def admit(journal, *group_ids):
    for group_id in group_ids:
        journal.note(Kind.ADMITTED, group_id, {"prompt": f"p{group_id}"})


def test_what_is_noted_during_a_commit_goes_into_the_next_one_in_order():
    async def scenario():
        store = SlowStore()
        journal = Journal(store)
        admit(journal, 0)
        await asyncio.sleep(0.02)  # its commit is under way, behind the gate
        admit(journal, 1, 2, 3)
        store.gate.set()
        await journal.flush()
        assert store.commits == [[0], [1, 2, 3]]

    asyncio.run(scenario())


def test_a_group_counts_as_finished_only_when_the_ledger_has_it():
    async def scenario():
        store = SlowStore()
        buffer = WorkBuffer(FreshnessBudget(2, 1, 1), Journal(store))
        await buffer.admit(lambda: (0, make_prompt(0)))
        await buffer.claim()
        finish = asyncio.create_task(buffer.finish(make_group(0)))
        take = asyncio.create_task(buffer.take())
        await asyncio.sleep(0.05)
        assert not finish.done() and not take.done()
        assert buffer.occupancy()["finished"] == 0
        store.gate.set()
        assert (await take).group_id == 0
        assert store.group(0, make_prompt(0)).group_id == 0

    asyncio.run(scenario())


def test_a_store_that_fails_fails_who_waits_and_who_notes_next():
    async def scenario():
        journal = Journal(BrokenStore())
        with pytest.raises(LedgerError, match="disk is full"):
            await journal.write(Kind.ADMITTED, 0, {"prompt": "p"})
        with pytest.raises(LedgerError, match="disk is full"):
            admit(journal, 1)

    asyncio.run(scenario())


def test_flush_with_nothing_noted_returns_at_once():
    asyncio.run(asyncio.wait_for(Journal(SlowStore()).flush(), 1))


def lead_a_life(journal, group_id, step):
    journal.note(Kind.ADMITTED, group_id, {"prompt": f"p{group_id}"})
    journal.note(Kind.CLAIMED, group_id)
    versions = {"oldest": step, "newest": step}
    journal.note(Kind.FINISHED, group_id, versions, group=make_group(group_id))
    journal.note(Kind.BATCHED, step, {"trained": [group_id], "held": [], "dropped": {}})
    journal.note(Kind.TRAINED, step, {"checksum": 7})


def test_samples_are_kept_until_their_step_is_settled():
    async def scenario():
        store = SlowStore()
        store.gate.set()
        journal = Journal(store, revocable=True)
        for step in range(4):
            lead_a_life(journal, step, step)
        await journal.flush()
        assert store.group_ids() == {0, 1, 2, 3}
        journal.settle(2)
        await journal.flush()
        assert store.group_ids() == {2, 3}

    asyncio.run(scenario())


def test_without_anything_to_resume_from_a_run_of_any_length_leaves_little():
    store = MemoryStore()
    journal = Journal(store)
    sizes = []
    for step in range(1000):
        lead_a_life(journal, step, step)
        sizes.append(len(list(store.history())))
        assert store.group_ids() == set()
    assert max(sizes[:500]) == max(sizes[500:])
    assert journal.state.balance().trained == 1000
    assert len(journal.state.live) == len(journal.state.batches) == 0


def test_a_journal_goes_on_where_the_store_ends_and_cleans_up_behind_a_crash():
    async def scenario():
        store = SlowStore()
        store.gate.set()
        journal = Journal(store, revocable=True)
        lead_a_life(journal, 0, 0)
        journal.settle(1)
        store.forget = lambda ids: None  # it dies before the samples are deleted
        await journal.flush()
        del store.forget
        assert store.group_ids() == {0}
        successor = Journal(store, revocable=True)
        assert store.group_ids() == set()
        assert successor.state == journal.state

    asyncio.run(scenario())
