"""Assembling batches: what is dropped, what is kept, and what each step uses up."""

import asyncio

import pytest

from paceline.controller.groups.assembly import Collector, NoSignalError
from paceline.controller.groups.buffer import WorkBuffer
from paceline.controller.groups.freshness import FreshnessBudget
from paceline.controller.groups.signal_filter import EVERYTHING, SignalFilter
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from tests.controller.builders import make_group, make_prompt

SIGNAL, NONE = (0.0, 1.0), (1.0, 1.0)


def collect(rewards_in_order, *, groups_per_step, capacity, max_draws=8, steps=1):
    async def scenario():
        journal = Journal(MemoryStore())
        buffer = WorkBuffer(FreshnessBudget(capacity, 1, groups_per_step), journal)
        collector = Collector(buffer, journal, SignalFilter(max_draws=max_draws), groups_per_step)

        async def produce():
            for position, rewards in enumerate(rewards_in_order):
                await buffer.admit(lambda position=position: (position, make_prompt(position)))
                work = await buffer.claim()
                await buffer.finish(make_group(work.group_id, rewards))

        producer = asyncio.ensure_future(produce())
        try:
            batches = [await asyncio.wait_for(collector.collect(step), 5) for step in range(steps)]
        finally:
            producer.cancel()
        return batches, buffer

    return asyncio.run(scenario())


def test_groups_without_signal_are_replaced_and_free_their_slot_at_once():
    (batch,), buffer = collect([NONE, SIGNAL, NONE, SIGNAL], groups_per_step=2, capacity=2)
    assert batch.batch.group_ids == (1, 3)
    assert batch.dropped == {"zero_signal": 2}
    assert buffer.unreleased() == (1, 3)


def test_a_step_that_makes_do_with_fewer_groups_still_uses_up_its_share_of_slots():
    rewards = [NONE, SIGNAL, NONE, NONE, NONE, NONE]
    (batch,), buffer = collect(rewards, groups_per_step=3, capacity=3, max_draws=2)
    assert batch.batch.group_ids == (1,)
    assert len(batch.slots) == 3
    assert set(batch.slots) == set(buffer.unreleased())


def test_nothing_to_learn_from_is_an_error_with_the_mean_reward():
    with pytest.raises(NoSignalError, match=r"last 4 groups .*mean 1\.00"):
        collect([NONE] * 6, groups_per_step=2, capacity=2, max_draws=2)


def test_a_faulty_group_is_dropped_whatever_its_rewards():
    async def scenario():
        journal = Journal(MemoryStore())
        buffer = WorkBuffer(FreshnessBudget(2, 1, 1), journal)
        for position in range(2):
            await buffer.admit(lambda position=position: (position, make_prompt(position)))
            await buffer.claim()
        faulty = make_group(0, SIGNAL)
        await buffer.finish(faulty.__class__(0, faulty.prompt, faulty.trajectories, "grader_error"))
        await buffer.finish(make_group(1, SIGNAL))
        return await Collector(buffer, journal, SignalFilter(), 1).collect(0)

    batch = asyncio.run(scenario())
    assert batch.batch.group_ids == (1,)
    assert batch.dropped == {"grader_error": 1}


def test_samples_arrive_with_reward_group_and_versions():
    (batch,), _ = collect([SIGNAL, SIGNAL[::-1]], groups_per_step=2, capacity=2)
    assert [sample.group for sample in batch.batch.samples] == [0, 0, 1, 1]
    assert [sample.reward for sample in batch.batch.samples] == [*SIGNAL, *SIGNAL[::-1]]
    assert all(sample.versions[0].version == 0 for sample in batch.batch.samples)


def test_demonstrations_are_all_trained():
    assert EVERYTHING.drop_reason(make_group(0, (0.0, 0.0))) is None
    assert SignalFilter().drop_reason(make_group(0, (0.0, 0.0))) == "zero_signal"
