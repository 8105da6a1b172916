"""The work buffer: bounded, ordered, and nobody waits for ever."""

import asyncio
import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.controller.groups.buffer import State, Work, WorkBuffer
from paceline.controller.groups.freshness import FreshnessBudget
from paceline.controller.ledger.events import Kind
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from tests.controller.builders import make_completion, make_group, make_prompt

GROUP_BYTES = make_group(0).num_bytes


def feed():
    positions = itertools.count()
    return lambda: (position := next(positions), make_prompt(position))


async def is_blocked(awaitable) -> bool:
    task = asyncio.ensure_future(awaitable)
    for _ in range(5):
        await asyncio.sleep(0)
    done = task.done()
    task.cancel()
    return not done


def test_a_slot_is_held_until_it_is_released_not_until_the_group_is_taken():
    async def scenario():
        buffer, draw = WorkBuffer(FreshnessBudget(2, 1, 1)), feed()
        for _ in range(2):
            await buffer.admit(draw)
        assert await is_blocked(buffer.admit(draw))
        work = await buffer.claim()
        await buffer.finish(make_group(work.group_id))
        await buffer.take()
        assert await is_blocked(buffer.admit(draw))
        await buffer.release((0,))
        assert (await buffer.admit(draw)).group_id == 2
        assert buffer.unreleased() == (1, 2)

    asyncio.run(scenario())


def test_a_prompt_is_drawn_only_when_it_can_be_admitted():
    async def scenario():
        buffer, draw = WorkBuffer(FreshnessBudget(1, 1, 1)), feed()
        await buffer.admit(draw)
        await is_blocked(buffer.admit(draw))
        assert draw()[0] == 1

    asyncio.run(scenario())


def test_a_claim_that_is_given_back_is_claimed_again_first():
    async def scenario():
        buffer, draw = WorkBuffer(FreshnessBudget(3, 1, 1)), feed()
        for _ in range(3):
            await buffer.admit(draw)
        first = await buffer.claim()
        await buffer.claim()
        await buffer.give_back(first)
        assert (await buffer.claim()).group_id == first.group_id == 0

    asyncio.run(scenario())


def test_a_group_is_finished_once():
    async def scenario():
        buffer = WorkBuffer(FreshnessBudget(2, 1, 1))
        await buffer.admit(feed())
        await buffer.claim()
        await buffer.finish(make_group(0))
        with pytest.raises(AssertionError):
            await buffer.finish(make_group(0))

    asyncio.run(scenario())


@pytest.mark.parametrize(("window", "taken"), [(1, None), (2, None), (3, 2), (9, 2)])
def test_a_finished_group_overtakes_at_most_the_window(window, taken):
    async def scenario():
        buffer, draw = WorkBuffer(FreshnessBudget(4, window, 1)), feed()
        for _ in range(4):
            await buffer.admit(draw)
            await buffer.claim()
        await buffer.finish(make_group(2))
        if taken is None:
            assert await is_blocked(buffer.take())
        else:
            assert (await buffer.take()).group_id == taken

    asyncio.run(scenario())


def test_taking_a_younger_group_does_not_move_the_window():
    async def scenario():
        buffer, draw = WorkBuffer(FreshnessBudget(4, 2, 1)), feed()
        for _ in range(4):
            await buffer.admit(draw)
            await buffer.claim()
        for finished in (1, 2, 3):
            await buffer.finish(make_group(finished))
        assert (await buffer.take()).group_id == 1
        assert await is_blocked(buffer.take())

    asyncio.run(scenario())


def test_a_lower_limit_lets_nothing_in_until_slots_are_free():
    async def scenario():
        buffer, draw = WorkBuffer(FreshnessBudget(4, 1, 1)), feed()
        await buffer.admit(draw)
        buffer.limit = 2
        await buffer.admit(draw)
        admission = asyncio.ensure_future(buffer.admit(draw))
        await asyncio.sleep(0)
        assert not admission.done()
        buffer.limit = 3
        assert (await asyncio.wait_for(admission, 1)).group_id == 2

    asyncio.run(scenario())


def test_full_memory_stops_sampling_ahead_but_not_the_group_that_is_waited_for():
    async def scenario():
        buffer, draw = WorkBuffer(FreshnessBudget(8, 1, 1), max_bytes=3 * GROUP_BYTES), feed()
        for _ in range(8):
            await buffer.admit(draw)
        first, *ahead = [await buffer.claim() for _ in range(3)]
        for work in ahead:
            await buffer.finish(make_group(work.group_id))
        assert buffer.num_bytes == 2 * GROUP_BYTES
        assert await is_blocked(buffer.claim())  # the first may yet bring as much: 3 of 3
        await buffer.give_back(first)
        assert (await buffer.claim()).group_id == 0  # without it nothing would ever be taken
        await buffer.finish(make_group(0))
        assert await is_blocked(buffer.claim())
        await buffer.take()
        await buffer.take()
        assert (await buffer.claim()).group_id == 3
        assert buffer.num_bytes == GROUP_BYTES

    asyncio.run(scenario())


def test_memory_is_bounded_before_any_group_has_shown_its_size():
    async def scenario():
        budget = FreshnessBudget(8, 1, 1)
        buffer, draw = WorkBuffer(budget, None, 3 * GROUP_BYTES, GROUP_BYTES), feed()
        for _ in range(8):
            await buffer.admit(draw)
        for _ in range(3):
            await buffer.claim()
        assert await is_blocked(buffer.claim())

    asyncio.run(scenario())


def test_what_was_sampled_of_a_group_that_goes_back_is_there_for_the_next_claim():
    async def scenario():
        buffer, draw = WorkBuffer(FreshnessBudget(2, 1, 1)), feed()
        await buffer.admit(draw)
        partial = (make_completion(3), make_completion(4))
        await buffer.give_back(await buffer.claim(), partial)
        assert buffer.num_bytes == sum(each.num_bytes for each in partial)
        again = await buffer.claim()
        assert again.partial == partial
        await buffer.give_back(again)  # its worker died: what there was before is still there
        assert (await buffer.claim()).partial == partial

    asyncio.run(scenario())


def test_a_restored_buffer_samples_nothing_until_there_is_as_much_room_as_ever():
    """Else a group would be sampled before more others than the bound on its age allows for."""

    async def scenario():
        journal = Journal(MemoryStore())
        buffer = WorkBuffer(FreshnessBudget(3, 1, 1), journal)
        admit = [(i, {"prompt": f"p{i}"}) for i in (4, 5)]
        for group_id, detail in admit:
            journal.note(Kind.ADMITTED, group_id, detail)
        buffer.restore([Work(i, make_prompt(i)) for i, _ in admit], slots=(0, 1, 2))
        claim = asyncio.ensure_future(buffer.claim())
        await buffer.release((0,))
        await asyncio.sleep(0)
        assert not claim.done()  # 4 of 3 slots
        await buffer.release((1,))
        assert (await asyncio.wait_for(claim, 1)).group_id == 4

    asyncio.run(scenario())


def test_a_cancelled_wait_takes_nothing_away_from_the_others():
    async def scenario():
        buffer, draw = WorkBuffer(FreshnessBudget(2, 1, 1)), feed()
        leaves, stays = (asyncio.ensure_future(buffer.claim()) for _ in range(2))
        await asyncio.sleep(0)
        await buffer.admit(draw)  # wakes the first of them
        leaves.cancel()
        assert (await asyncio.wait_for(stays, 1)).group_id == 0

    asyncio.run(scenario())


def test_closing_ends_every_wait():
    async def scenario():
        buffer = WorkBuffer(FreshnessBudget(1, 1, 1))
        await buffer.admit(feed())
        await buffer.claim()
        waits = [buffer.admit(feed()), buffer.claim(), buffer.take()]
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        await asyncio.sleep(0)
        await buffer.close()
        assert await asyncio.wait_for(asyncio.gather(*tasks), 1) == [None, None, None]

    asyncio.run(scenario())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.sampled_from("acgftr"), max_size=60))
def test_any_interleaving_keeps_the_bound_and_loses_nothing(groups, window, actions):
    """Actions that would wait are skipped; all others run in any order."""

    async def scenario():
        budget = FreshnessBudget(2 * groups, window, groups)
        buffer, draw = WorkBuffer(budget), feed()
        claimed, untaken, held = [], 0, []
        for action in actions:
            occupancy = buffer.occupancy()
            if action == "a" and occupancy["slots"] < budget.capacity:
                await buffer.admit(draw)
                untaken += 1
            elif action == "c" and occupancy[State.WAITING.value]:
                claimed.append(await buffer.claim())
            elif action == "g" and claimed:
                await buffer.give_back(claimed.pop())
            elif action == "f" and claimed:
                await buffer.finish(make_group(claimed.pop(0).group_id))
            elif action == "t" and occupancy[State.FINISHED.value]:
                with contextlib.suppress(TimeoutError):  # finished, but outside the window
                    held.append((await asyncio.wait_for(buffer.take(), 0.001)).group_id)
                    untaken -= 1
            elif action == "r" and held:
                await buffer.release((held.pop(),))
            occupancy = buffer.occupancy()
            assert occupancy["slots"] <= budget.capacity
            assert occupancy["slots"] == untaken + len(held)
            assert sum(occupancy[state.value] for state in State) == untaken

    asyncio.run(scenario())
