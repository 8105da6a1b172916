"""Routing: the load is bounded and even, caches are used, and whoever waits has his turn."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.controller.engines.routing import (
    Affinity,
    Demand,
    Load,
    acceptable,
    choose,
    demand_of,
    most_samples,
    next_placement,
)
from tests.controller.engines.fake_workers import request, tokens_of

LIMIT = 10
LOADS = st.dictionaries(
    st.integers(0, 4),
    st.builds(Load, st.integers(0, LIMIT), st.integers(0, 500)),
)
DEMANDS = st.builds(Demand, st.builds(Load, st.integers(1, 14), st.integers(1, 300)), st.just(7))


def weight(samples, tokens=None):
    return Load(samples, tokens if tokens is not None else 10 * samples)


@pytest.mark.parametrize(
    ("asked", "load"),
    [
        (request("a", 4, prompt=(1, 2, 3), max_tokens=20), Load(4, 4 * (3 + 20))),
        (request("a", 4, prompt=(1, 2, 3), max_tokens=20, segment_tokens=5), Load(4, 4 * (3 + 5))),
        (
            request(
                "a",
                3,
                prompt=(1, 2, 3),
                max_tokens=20,
                segment_tokens=5,
                partial=(
                    tokens_of(9, reason="stop"),
                    tokens_of(6, reason="segment"),
                    tokens_of(18, reason="abort"),
                ),
            ),
            Load(2, (3 + 6 + 5) + (3 + 20)),
        ),
    ],
)
def test_a_request_weighs_what_its_open_samples_may_hold_when_their_turn_ends(asked, load):
    assert demand_of(asked).load == load


def test_a_worker_holds_a_quarter_more_than_its_engine_decodes_together():
    assert [most_samples(size) for size in (1, 4, 64, 256)] == [2, 5, 80, 320]


@settings(max_examples=300, deadline=None)
@given(LOADS, DEMANDS, st.none() | st.integers(0, 5))
def test_a_seat_has_room_and_the_least_load_or_a_warm_cache_at_a_bounded_price(loads, demand, home):
    room = {
        seat: load
        for seat, load in loads.items()
        if load.samples == 0 or load.samples + demand.load.samples <= LIMIT
    }
    seat = choose(demand, loads, LIMIT, home)
    if not room:
        assert seat is None
        return
    assert seat in room
    least = min(load.tokens for load in room.values())
    stays = home in room and room[home].tokens <= least + demand.load.tokens
    assert seat == home if stays else room[seat].tokens == least


def test_a_warm_cache_is_given_up_once_it_costs_more_than_the_request():
    demand = Demand(weight(1, tokens=150), prompt=7)
    loads = {0: Load(1, 300), 1: Load(1, 100)}
    assert choose(demand, loads, LIMIT, home=0) == 1
    assert choose(Demand(weight(1, tokens=200), prompt=7), loads, LIMIT, home=0) == 0


def test_the_worker_that_was_too_slow_is_avoided_where_another_serves():
    affinity = Affinity()
    demand = Demand(weight(1), prompt=7)
    affinity.remember(7, 0, was_slow=True)
    assert affinity.home(7) is None
    assert acceptable(demand, {0, 1}, affinity) == {1}
    assert acceptable(demand, {0}, affinity) == {0}
    assert acceptable(Demand(weight(1), prompt=8), {0, 1}, affinity) == {0, 1}
    affinity.remember(7, 0)
    assert (affinity.home(7), acceptable(demand, {0, 1}, affinity)) == (0, {0, 1})


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3))), st.integers(1, 8))
def test_no_more_prompts_are_remembered_than_asked_for_and_those_are_the_latest(notes, capacity):
    affinity = Affinity(capacity)
    for prompt, seat in notes:
        affinity.remember(prompt, seat)
    latest = list(dict.fromkeys(prompt for prompt, _ in reversed(notes)))
    seats = dict(notes)
    assert len(affinity) == min(capacity, len(latest))
    assert all(affinity.home(prompt) == seats[prompt] for prompt in latest[:capacity])
    assert all(affinity.home(prompt) is None for prompt in latest[capacity:])


class Queue:
    """The pool's book-keeping around `next_placement`, without workers."""

    def __init__(self, num_seats):
        self.affinity = Affinity()
        self.loads = {seat: Load() for seat in range(num_seats)}
        self.waiting = []
        self.running = []
        self.served = []
        self._names = count()

    def arrive(self, demand):
        self.waiting.append((next(self._names), demand))
        self.dispatch()

    def leave(self, index, was_slow=False):
        _, demand, seat = self.running.pop(index)
        self.loads[seat] -= demand.load
        if was_slow:
            self.affinity.remember(demand.prompt, seat, was_slow=True)
        self.dispatch()

    def dispatch(self):
        demands = [demand for _, demand in self.waiting]
        while found := next_placement(demands, self.loads, LIMIT, self.affinity):
            position, seat = found
            earlier = (demand for _, demand in self.waiting[:position])
            assert all(seat not in acceptable(e, self.loads, self.affinity) for e in earlier)
            name, demand = self.waiting.pop(position)
            demands.pop(position)
            self.loads[seat] += demand.load
            self.affinity.remember(demand.prompt, seat)
            self.running.append((name, demand, seat))
            self.served.append(name)
            assert self.loads[seat].samples <= LIMIT or self.loads[seat] == demand.load


ARRIVALS = st.builds(
    Demand,
    st.builds(weight, st.integers(1, 14)),
    st.integers(0, 5),
    st.none() | st.none() | st.integers(0, 2),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(ARRIVALS, st.floats(0, 1), st.booleans()), max_size=40))
def test_nobody_is_overtaken_at_a_seat_he_may_take_and_everybody_is_served(schedule):
    queue = Queue(3)
    for demand, who, was_slow in schedule:
        queue.arrive(demand)
        # Whoever waits longest is kept from his seats by their load alone.
        if queue.waiting:
            first = queue.waiting[0][1]
            seats = acceptable(first, queue.loads, queue.affinity)
            assert seats
            assert choose(first, {seat: queue.loads[seat] for seat in seats}, LIMIT) is None
        if queue.running and who < 0.6:
            queue.leave(int(who / 0.6 * len(queue.running)), was_slow)
    while queue.running:
        queue.leave(0)
    assert queue.waiting == []
    assert sorted(queue.served) == list(range(len(schedule)))
    assert set(queue.loads.values()) <= {Load()}


@given(st.lists(st.integers(1, 14).map(lambda n: Demand(weight(n), prompt=n)), max_size=30))
def test_where_every_seat_will_do_the_order_is_that_of_arrival(demands):
    queue = Queue(2)
    for demand in demands:
        queue.arrive(demand)
    while queue.running:
        queue.leave(0)
    assert queue.served == list(range(len(demands)))


def test_a_large_request_is_served_though_small_ones_keep_coming():
    queue = Queue(2)
    for prompt in range(20):
        queue.arrive(Demand(weight(1), prompt))
    queue.arrive(Demand(weight(LIMIT), prompt=100))
    large = 20
    for turn in range(40):
        queue.arrive(Demand(weight(1), 200 + turn))
        queue.leave(0)
        if large in queue.served:
            break
    assert turn <= 20, "it waits for what ran when it came, at most"


def test_one_that_avoids_a_seat_does_not_keep_others_from_it():
    queue = Queue(2)
    queue.affinity.remember(7, 0, was_slow=True)
    queue.loads[1] = weight(LIMIT)
    queue.arrive(Demand(weight(1), prompt=7))
    queue.arrive(Demand(weight(1), prompt=8))
    assert queue.served == [1]
    assert [seat for _, _, seat in queue.running] == [0]
