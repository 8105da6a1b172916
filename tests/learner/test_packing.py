"""Laws of packing: every sample once, nothing over capacity, ranks in step and balanced."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.errors import ConfigError
from paceline.learner.packing import plan_packing

lengths_strategy = st.lists(st.integers(1, 64), max_size=80)


@given(lengths_strategy, st.integers(1, 5), st.integers(64, 300), st.floats(0, 0.1))
def test_every_sample_is_packed_exactly_once_and_no_microbatch_exceeds_its_capacity(
    lengths, num_ranks, capacity, quadratic_cost
):
    plan = plan_packing(lengths, num_ranks, capacity, quadratic_cost)
    packed = [i for rank in plan.microbatches for microbatch in rank for i in microbatch]
    assert sorted(packed) == list(range(len(lengths)))
    for rank in plan.microbatches:
        for microbatch in rank:
            assert sum(lengths[i] for i in microbatch) <= capacity


@given(lengths_strategy, st.integers(1, 5), st.integers(64, 300))
def test_all_ranks_run_equally_many_microbatches(lengths, num_ranks, capacity):
    plan = plan_packing(lengths, num_ranks, capacity)
    assert len(plan.microbatches) == num_ranks
    assert len({len(rank) for rank in plan.microbatches}) == 1
    assert len(plan.microbatches[0]) >= 1


@given(lengths_strategy, st.integers(1, 5), st.integers(64, 300))
def test_microbatches_are_empty_only_on_ranks_with_fewer_samples_than_microbatches(
    lengths, num_ranks, capacity
):
    for rank in plan_packing(lengths, num_ranks, capacity).microbatches:
        if any(not microbatch for microbatch in rank):
            assert all(len(microbatch) <= 1 for microbatch in rank)


@given(lengths_strategy, st.integers(1, 5), st.integers(64, 300))
def test_microbatches_are_sorted_longest_first(lengths, num_ranks, capacity):
    for rank in plan_packing(lengths, num_ranks, capacity).microbatches:
        for microbatch in rank:
            sizes = [lengths[i] for i in microbatch]
            assert sizes == sorted(sizes, reverse=True)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80), st.integers(1, 5), st.floats(0, 0.1))
def test_costs_of_ranks_differ_by_at_most_the_costliest_sample(lengths, num_ranks, quadratic_cost):
    plan = plan_packing(lengths, num_ranks, 64, quadratic_cost)
    costs = np.array(lengths) + quadratic_cost * np.array(lengths) ** 2
    totals = [sum(costs[i] for m in rank for i in m) for rank in plan.microbatches]
    assert max(totals) - min(totals) <= costs.max() + 1e-9


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80), st.integers(64, 300))
def test_one_rank_fills_all_but_one_microbatch_at_least_half(lengths, capacity):
    microbatches = plan_packing(lengths, 1, capacity).microbatches[0]
    filled = sorted(sum(lengths[i] for i in microbatch) for microbatch in microbatches)
    assert all(2 * tokens >= capacity for tokens in filled[1:])


def test_long_samples_are_balanced_by_quadratic_cost():
    # by tokens alone 8 and 8 x 1 would balance; attention makes the long one outweigh them
    plan = plan_packing([8] + [1] * 16, 2, 64, quadratic_cost=1.0)
    sizes = [sum(len(microbatch) for microbatch in rank) for rank in plan.microbatches]
    assert sizes == [1, 16]


def test_a_sample_longer_than_a_microbatch_is_refused_by_name():
    with pytest.raises(ConfigError, match="tokens_per_microbatch"):
        plan_packing([10, 65], 1, 64)
