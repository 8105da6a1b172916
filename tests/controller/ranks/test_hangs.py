"""Who holds up whom: the rank that stood still is named, whatever the others wait in."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paceline.configs.vocabulary import RankProgress
from paceline.controller.ranks.hangs import HangWatch, RankStatus, held_up_by

REST = RankStatus(
    "forward_backward", 1, 0.0, RankProgress(3, "update 1 of 1"), "f (a.py:1)", None, "stack", 0, 0
)


def status(waits_in=None, call="forward_backward", **collectives):
    progress = RankProgress(3, "update 1 of 1, policy, microbatch 1 of 2", collectives)
    return replace(REST, call=call, progress=progress, waits_in=waits_in)


def stuck(schedule, num_ranks, culprit, after):
    """Ranks run a schedule of collectives, each over a group, until none moves any more.

    The culprit stops, outside of any collective, once it has done ``after`` of its own. A
    collective ends when all of its group have begun it.
    """
    mine = {r: [group for group in schedule if r in group] for r in range(num_ranks)}
    begun = dict.fromkeys(range(num_ranks), 0)
    done = dict.fromkeys(range(num_ranks), 0)

    def count(rank, group, upto):
        return sum(g == group for g in mine[rank][:upto])

    moves = True
    while moves:
        moves = False
        for rank in range(num_ranks):
            stops = rank == culprit and done[rank] >= after
            if begun[rank] == done[rank] < len(mine[rank]) and not stops:
                begun[rank] += 1
                moves = True
            if begun[rank] > done[rank]:
                group = mine[rank][done[rank]]
                number = count(rank, group, begun[rank])
                if all(count(other, group, begun[other]) >= number for other in group):
                    done[rank] += 1
                    moves = True
    return {
        rank: status(
            waits_in="all_reduce" if begun[rank] > done[rank] else None,
            call="forward_backward" if begun[rank] > done[rank] or rank == culprit else None,
            **{str(group): count(rank, group, begun[rank]) for group in set(mine[rank])},
        )
        for rank in range(num_ranks)
    }


@st.composite
def hangs(draw):
    """A schedule over the rows and columns of a mesh of ranks and all of them, and who stops."""
    rows, columns = draw(st.sampled_from([(1, 2), (2, 2), (2, 3), (1, 4)]))
    ranks = range(rows * columns)
    groups = [tuple(ranks)]
    groups += [tuple(r for r in ranks if r // columns == row) for row in range(rows)]
    groups += [tuple(r for r in ranks if r % columns == column) for column in range(columns)]
    groups = [group for group in groups if len(group) > 1]
    schedule = draw(st.lists(st.sampled_from(groups), min_size=1, max_size=12))
    culprit = draw(st.sampled_from(sorted(set().union(*schedule))))
    num_own = sum(culprit in group for group in schedule)
    return schedule, len(ranks), culprit, draw(st.integers(0, num_own - 1))


CHAIN = ([(0, 1), (1, 3), (0, 1, 2, 3)], 4, 0, 0)
"""Rank 3 waits for 1, which waits for 0."""


@given(hangs())
@example(CHAIN)
def test_whatever_waits_for_whom_the_rank_that_stopped_is_named(hang):
    statuses = stuck(*hang)
    assert held_up_by(statuses) == [hang[2]]


@given(hangs())
@example(CHAIN)
def test_it_is_named_by_its_collectives_alone_where_no_line_shows_who_waits(hang):
    """As on GPUs, where a collective returns at once and the device waits."""
    statuses = stuck(*hang)
    silent = {rank: replace(each, waits_in=None) for rank, each in statuses.items()}
    assert held_up_by(silent) == [hang[2]]


def test_where_all_wait_in_the_same_collective_nobody_is_named():
    statuses = {rank: status("all_gather", world=7) for rank in range(3)}
    assert held_up_by(statuses) == []


WAITS, HANGS = status("all_reduce", world=7), status(world=6)


def watched(seconds, *looks):
    watch = HangWatch(10.0)
    return [watch.observe(second, look) for second, look in zip(seconds, looks, strict=True)]


def test_a_rank_is_named_once_it_kept_the_others_waiting_long_enough_and_not_before():
    looks = [{0: WAITS, 1: HANGS}] * 4
    *before, found = watched((0, 4, 9.9, 10), *looks)
    assert before == [None] * 3
    assert (found.ranks, found.seconds, found.kind) == ((1,), 10, "behind")
    assert found.message() == (
        "learner rank 1 holds up the others for 10 s: in forward_backward (update 1 of 1, policy, "
        "microbatch 1 of 2) of step 3, at f (a.py:1); waiting: rank 0 in all_reduce in "
        "forward_backward (update 1 of 1, policy, microbatch 1 of 2) of step 3"
    )
    report = found.report()
    assert "== learner rank 0: in forward_backward" in report
    assert report.count("stack") == 2


def test_ranks_that_get_on_are_no_hang_however_long_the_call_takes():
    each = itertools.count()
    looks = [{0: WAITS, 1: status(world=next(each))} for _ in range(6)]
    assert watched(range(0, 60, 10), *looks) == [None] * 6


RESTS = status(call=None, world=6)


@pytest.mark.parametrize("others", [{}, {1: RESTS}], ids=["alone", "with-another"])
@pytest.mark.parametrize("sign", ["busy_seconds", "disk_blocks"])
def test_long_work_that_nobody_waits_for_is_no_hang(others, sign):
    looks = [{0: replace(HANGS, **{sign: 10 * n}), **others} for n in range(3)]
    assert watched((0, 50, 100), *looks) == [None] * 3


@pytest.mark.parametrize("others", [{}, {1: RESTS}], ids=["alone", "with-another"])
def test_a_rank_that_nobody_waits_for_and_that_does_nothing_is_named(others):
    """Its process answers, which costs it a little time."""
    looks = [{0: replace(HANGS, busy_seconds=0.1 * n), **others} for n in range(4)]
    *before, found = watched((0, 4, 9.9, 14), *looks)
    assert before == [None] * 3
    assert (found.ranks, found.seconds, found.kind) == ((0,), 14, "idle")
    assert found.message() == (
        "learner rank 0 does nothing for 14 s: in forward_backward (update 1 of 1, policy, "
        "microbatch 1 of 2) of step 3, at f (a.py:1)"
    )


def test_a_rank_counts_as_idle_from_when_it_last_worked():
    work = (0, 5, 5, 5, 5)
    looks = [{0: replace(HANGS, busy_seconds=seconds)} for seconds in work]
    *before, found = watched((0, 8, 12, 17, 18), *looks)
    assert before == [None] * 4
    assert (found.ranks, found.seconds) == ((0,), 10)


def test_a_rank_that_does_not_answer_is_named_with_where_it_was_seen_last():
    found = watched((0, 4, 10), {0: WAITS, 1: HANGS}, {0: WAITS, 1: None}, {0: WAITS, 1: None})
    assert found[:2] == [None, None]
    assert (found[2].ranks, found[2].kind) == ((1,), "silent")
    assert "learner rank 1 does not answer for 10 s" in found[2].message()
    assert "last seen in forward_backward" in found[2].message()


def test_an_answer_ends_the_silence():
    looks = [{0: WAITS, 1: None}, {0: WAITS, 1: status(world=8)}, {0: WAITS, 1: None}]
    assert watched((0, 9, 18), *looks) == [None] * 3


def test_a_rank_that_never_answered_is_named_too():
    found = watched((0, 10), {0: WAITS, 1: None}, {0: WAITS, 1: None})[1]
    assert found.ranks == (1,)
    assert "rank 0 in all_reduce in forward_backward" in found.message()
    assert "== learner rank 1: never answered" in found.report()
