"""Laws of packing: everything once, nothing over capacity, ranks in step and balanced."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.errors import ConfigError
from paceline.learner.batch.packing import imbalance, plan_packing

sizes_strategy = st.lists(st.integers(1, 64), max_size=80)
ranks_strategy = st.integers(1, 5)
capacity_strategy = st.integers(64, 300)


@given(sizes_strategy, ranks_strategy, capacity_strategy)
def test_everything_is_packed_exactly_once_and_no_microbatch_exceeds_its_capacity(
    sizes, num_ranks, capacity
):
    plan = plan_packing(sizes, sizes, num_ranks, capacity)
    packed = [i for rank in plan for microbatch in rank for i in microbatch]
    assert sorted(packed) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in m) <= capacity for rank in plan for m in rank)


def test_what_is_large_and_cheap_finds_room_though_the_costly_are_spread_first():
    """Balancing by cost leaves it none: the microbatches of first fit are divided instead."""
    plan = plan_packing([1, 1, 1, 10], [3, 2, 1, 0.5], num_ranks=1, capacity=10, fewest=3)
    assert sorted(map(sorted, plan[0])) == [[0, 2], [1], [3]]


@given(sizes_strategy, ranks_strategy, capacity_strategy)
def test_all_ranks_run_equally_many_microbatches(sizes, num_ranks, capacity):
    plan = plan_packing(sizes, sizes, num_ranks, capacity)
    assert len(plan) == num_ranks
    assert len({len(rank) for rank in plan}) == 1
    assert plan[0]


@given(sizes_strategy, ranks_strategy, st.integers(1, 6), st.integers(1, 6))
def test_a_pipeline_gets_as_many_microbatches_as_it_needs(sizes, num_ranks, fewest, multiple_of):
    plan = plan_packing(sizes, sizes, num_ranks, 64, fewest=fewest, multiple_of=multiple_of)
    plain = plan_packing(sizes, sizes, num_ranks, 64)
    [number] = {len(rank) for rank in plan}
    assert number % multiple_of == 0
    assert 0 <= number - max(fewest, len(plain[0])) < multiple_of
    assert sorted(i for rank in plan for m in rank for i in m) == list(range(len(sizes)))


@given(sizes_strategy, ranks_strategy, capacity_strategy)
def test_microbatches_are_empty_only_on_ranks_with_less_than_one_thing_for_each(
    sizes, num_ranks, capacity
):
    for rank in plan_packing(sizes, sizes, num_ranks, capacity):
        if any(not microbatch for microbatch in rank):
            assert all(len(microbatch) <= 1 for microbatch in rank)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.floats(0, 100)), min_size=1, max_size=80),
    ranks_strategy,
)
def test_costs_of_ranks_differ_by_at_most_the_costliest_thing(sizes_and_costs, num_ranks):
    sizes, costs = zip(*sizes_and_costs, strict=True)
    plan = plan_packing(sizes, costs, num_ranks, 64)
    totals = [sum(costs[i] for m in rank for i in m) for rank in plan]
    assert max(totals) - min(totals) <= max(costs) + 1e-6


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80), capacity_strategy)
def test_one_rank_fills_all_but_one_microbatch_at_least_half(sizes, capacity):
    [microbatches] = plan_packing(sizes, sizes, 1, capacity)
    filled = sorted(sum(sizes[i] for i in microbatch) for microbatch in microbatches)
    assert all(2 * tokens >= capacity for tokens in filled[1:])


def test_ranks_are_balanced_by_cost_not_by_size():
    plan = plan_packing([8] + [1] * 16, [64.0] + [2.0] * 16, 2, 64)
    assert [sum(len(microbatch) for microbatch in rank) for rank in plan] == [1, 16]


def test_what_does_not_fit_a_microbatch_is_refused_by_name():
    with pytest.raises(ConfigError, match="a sample of 65 tokens.*tokens_per_microbatch"):
        plan_packing([10, 65], [10, 65], 1, 64)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.floats(0, 100)), min_size=1, max_size=80),
    ranks_strategy,
    st.integers(1, 6),
)
def test_costs_of_microbatches_differ_by_at_most_the_costliest_thing_where_there_is_room(
    sizes_and_costs, num_ranks, fewest
):
    sizes, costs = zip(*sizes_and_costs, strict=True)
    for rank in plan_packing(sizes, costs, num_ranks, 64 * 80, fewest=fewest):
        totals = [sum(costs[i] for i in microbatch) for microbatch in rank]
        assert max(totals) - min(totals) <= max(costs) * (1 + 1e-9)


@given(sizes_strategy, ranks_strategy, capacity_strategy)
def test_the_costliest_microbatch_of_every_rank_comes_first(sizes, num_ranks, capacity):
    costs = [size**2 for size in sizes]
    for rank in plan_packing(sizes, costs, num_ranks, capacity):
        totals = [sum(costs[i] for i in microbatch) for microbatch in rank]
        assert totals == sorted(totals, reverse=True)


def test_on_a_long_tailed_batch_ranks_hardly_wait_for_each_other():
    generator = np.random.default_rng(0)
    lengths = np.clip(np.exp(5 + 1.1 * generator.standard_normal(512)), 8, 4096).astype(int)
    costs = lengths + 1e-4 * lengths**2
    plan = plan_packing(lengths, costs, 8, 8192)
    assert imbalance(plan, costs) < 0.02
    in_order = [
        list(map(tuple, np.array_split(np.arange(64 * r, 64 * r + 64), 2))) for r in range(8)
    ]
    assert imbalance(in_order, costs) > 5 * imbalance(plan, costs)


def test_imbalance_is_the_share_of_time_spent_waiting():
    assert imbalance([[(0,), (1,)], [(2,), ()]], [3.0, 1.0, 2.0]) == pytest.approx(1 - 3 / 4)
    assert imbalance([[()], [()]], []) == 0
