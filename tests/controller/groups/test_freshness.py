"""The freshness arithmetic: what may be in flight, and how old it can get."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.errors import ConfigError
from paceline.controller.groups.freshness import freshness_budget


@given(st.integers(1, 200), st.integers(0, 20), st.floats(0, 1, exclude_max=True))
def test_the_bound_of_any_budget_is_the_lag_that_was_promised(groups, lag, fraction):
    budget = freshness_budget(groups, lag, fraction)
    assert budget.max_age == lag


@given(st.integers(1, 200), st.integers(0, 20), st.floats(0, 1, exclude_max=True))
def test_a_batch_always_fits_the_budget(groups, lag, fraction):
    budget = freshness_budget(groups, lag, fraction)
    assert budget.capacity >= groups
    assert 1 <= budget.window <= budget.capacity


def test_strict_order_gives_every_slot_to_work():
    assert freshness_budget(4, 1).capacity == 8
    assert freshness_budget(4, 0).capacity == 4
    assert freshness_budget(4, 2).window == 1


def test_a_window_is_paid_for_in_capacity():
    budget = freshness_budget(4, 1, window_fraction=0.4)
    assert (budget.window, budget.capacity, budget.max_age) == (3, 6, 1)


@pytest.mark.parametrize("arguments", [(0, 1, 0.0), (4, -1, 0.0), (4, 1, 1.0), (4, 1, -0.1)])
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match="expected groups_per_step >= 1"):
        freshness_budget(*arguments)
