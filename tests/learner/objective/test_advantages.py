"""Advantages by hand, and what must hold of them for any batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from paceline.learner.objective.advantages import (
    BatchNormalized,
    GeneralizedAdvantage,
    GroupRelative,
    LeaveOneOut,
    Outcome,
    PreferredPair,
    TeacherGap,
    generalized_advantages,
    sums_from_here,
)
from tests.learner.batch.token_tables import nothing, token_tables, tokens_of

FOUR = tokens_of([1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0], [1, 2, 1, 1])


def advantages(estimator, tokens, token_rewards=None):
    token_rewards = nothing(tokens) if token_rewards is None else np.array(token_rewards)
    return estimator(tokens, token_rewards).advantages


def test_grpo_by_hand():
    found = advantages(GroupRelative(epsilon=0.0), FOUR)
    np.testing.assert_allclose(found, [1.5, -0.5, -0.5, -0.5, -0.5], rtol=1e-12)


def test_dr_grpo_by_hand():
    found = advantages(GroupRelative(normalize_std=False), FOUR)
    np.testing.assert_allclose(found, [0.75, -0.25, -0.25, -0.25, -0.25], rtol=1e-12)


def test_rloo_by_hand():
    tokens = tokens_of([3.0, 1.0, 2.0, 7.0], [0, 0, 0, 1], [1, 2, 1, 1])
    # against the means of the siblings 1.5, 2.5 and 2; an only child has none
    np.testing.assert_allclose(advantages(LeaveOneOut(), tokens), [1.5, -1.5, -1.5, 0.0, 0.0])


def test_reinforce_plus_plus_by_hand():
    tokens = tokens_of([1.0, 0.0], [0, 1], [1, 3])
    # tokens 1, 0, 0, 0: mean 1/4, standard deviation sqrt(3)/4
    expected = np.array([3.0, -1.0, -1.0, -1.0]) / np.sqrt(3)
    np.testing.assert_allclose(advantages(BatchNormalized(epsilon=0.0), tokens), expected)


def test_reinforce_plus_plus_counts_the_penalties_that_are_still_to_come():
    tokens = tokens_of([1.0], [0], [3])
    returns = np.array([1.0 - 0.6, 1.0 - 0.5, 1.0 - 0.3])
    found = advantages(BatchNormalized(epsilon=0.0), tokens, [-0.1, -0.2, -0.3])
    np.testing.assert_allclose(found, (returns - returns.mean()) / returns.std())


def test_gae_by_hand():
    tokens = tokens_of([1.0, 0.0], [0, 1], [2, 1], values=[0.5, 0.25, 0.75])
    estimate = GeneralizedAdvantage(discount=0.9, trace_decay=0.8, normalize=False)(
        tokens, np.zeros(3)
    )
    last = 1.0 - 0.25
    first = (0.9 * 0.25 - 0.5) + 0.9 * 0.8 * last
    np.testing.assert_allclose(estimate.advantages, [first, last, -0.75])
    np.testing.assert_allclose(estimate.returns, [first + 0.5, 1.0, 0.0])


def test_a_teacher_is_passed_through():
    tokens = tokens_of([0.0], [0], [2], behaviour=[-1.0, -2.0], teacher_logprobs=[-0.5, -3.0])
    estimate = TeacherGap()(tokens, np.zeros(2))
    np.testing.assert_allclose(estimate.advantages, [0.5, -1.0])
    assert estimate.metrics["teacher_reverse_kl"] == pytest.approx(0.25)


def test_preferred_pair_by_hand():
    tokens = tokens_of(
        [0.0, 1.0],
        [0, 0],
        [1, 2],
        proximal_logprobs=[-2.0, -1.0, -1.0],
        reference_logprobs=[-1.5, -2.0, -1.0],
    )
    estimate = PreferredPair(beta=0.5)(tokens, np.zeros(3))
    margin = 0.5 * (1.0 - -0.5)
    pull = 0.5 / (1 + np.exp(margin))
    np.testing.assert_allclose(estimate.advantages, [-pull, pull, pull])
    assert estimate.metrics["preference_loss"] == pytest.approx(np.log1p(np.exp(-margin)))
    assert estimate.metrics["preference_accuracy"] == 1.0


GROUPWISE = [GroupRelative(), GroupRelative(normalize_std=False), LeaveOneOut()]


@pytest.mark.parametrize("estimator", GROUPWISE)
@given(tokens=token_tables())
def test_advantages_of_a_group_sum_to_zero(estimator, tokens):
    of_samples = advantages(estimator, tokens)[tokens.starts]
    sums = np.bincount(tokens.groups, weights=of_samples)
    np.testing.assert_allclose(sums, 0, atol=1e-9)


@pytest.mark.parametrize("estimator", GROUPWISE)
@given(tokens=token_tables(), reward=st.floats(-10, 10))
def test_equal_rewards_have_exactly_no_advantage(estimator, tokens, reward):
    equal = tokens_of([reward] * len(tokens.rewards), tokens.groups, tokens.lengths)
    assert not advantages(estimator, equal).any()


@pytest.mark.parametrize("estimator", GROUPWISE)
@given(tokens=token_tables(), shift=st.floats(-5, 5))
def test_what_a_whole_group_gets_more_changes_nothing(estimator, tokens, shift):
    assume(np.abs(tokens.rewards).max() < 100)
    shifted = tokens_of(tokens.rewards + shift, tokens.groups, tokens.lengths)
    np.testing.assert_allclose(
        advantages(estimator, shifted), advantages(estimator, tokens), atol=1e-6
    )


@given(tokens=token_tables(), factor=st.floats(0.5, 20))
def test_grpo_knows_no_scale_of_rewards(tokens, factor):
    estimator = GroupRelative(epsilon=1e-300)
    scaled = tokens_of(tokens.rewards * factor, tokens.groups, tokens.lengths)
    np.testing.assert_allclose(
        advantages(estimator, scaled), advantages(estimator, tokens), atol=1e-6
    )


@pytest.mark.parametrize("baseline", ["none", "group"])
@given(tokens=token_tables())
def test_reinforce_plus_plus_has_mean_zero_and_spread_one_over_all_tokens(baseline, tokens):
    assume(np.ptp(tokens.rewards) > 0.1)
    found = advantages(BatchNormalized(baseline), tokens)
    assert found.mean() == pytest.approx(0, abs=1e-6)
    assert found.std() == pytest.approx(1, abs=1e-4) or not np.ptp(found)


@given(tokens=token_tables(), data=st.data())
def test_gae_with_full_traces_is_the_outcome_less_the_value(tokens, data):
    count = int(tokens.lengths.sum())
    values = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=count, max_size=count))
    valued = tokens_of(tokens.rewards, tokens.groups, tokens.lengths, values=values)
    estimate = GeneralizedAdvantage(normalize=False)(valued, np.zeros(count))
    np.testing.assert_allclose(estimate.returns, tokens.of_tokens(tokens.rewards), atol=1e-6)


@given(tokens=token_tables(), data=st.data())
def test_gae_is_the_double_sum_it_is_defined_as(tokens, data):
    count = int(tokens.lengths.sum())
    numbers = st.lists(st.floats(-2, 2, width=32), min_size=count, max_size=count)
    rewards, values = np.array(data.draw(numbers)), np.array(data.draw(numbers))
    found = generalized_advantages(rewards, values, tokens.lengths, 0.9, 0.7)
    for start, length in zip(tokens.starts, tokens.lengths, strict=True):
        sample = slice(start, start + length)
        following = np.append(values[sample][1:], 0.0)
        surprise = rewards[sample] + 0.9 * following - values[sample]
        for t in range(length):
            expected = sum((0.9 * 0.7) ** k * surprise[t + k] for k in range(length - t))
            assert found[start + t] == pytest.approx(expected, abs=1e-9)


@given(tokens=token_tables(), data=st.data())
def test_a_penalty_counts_towards_the_outcome_of_its_own_sample_only(tokens, data):
    count = int(tokens.lengths.sum())
    place = data.draw(st.integers(0, count - 1))
    penalties = np.zeros(count)
    penalties[place] = -1.0
    sample = int(np.searchsorted(tokens.starts, place, side="right")) - 1
    moved = advantages(Outcome(), tokens, penalties) - advantages(Outcome(), tokens)
    expected = tokens.of_tokens(-1.0 * (np.arange(len(tokens.rewards)) == sample))
    np.testing.assert_allclose(moved, expected, atol=1e-9)
    later = sums_from_here(tokens, penalties)
    inside = slice(tokens.starts[sample], tokens.starts[sample] + tokens.lengths[sample])
    assert later[inside].sum() == pytest.approx(-(place - tokens.starts[sample] + 1))
    assert later.sum() == pytest.approx(later[inside].sum())
