"""Curves of what drafts gain and cost are learned from what rounds were offered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline.spec.acceptance import AcceptanceHistory, AcceptancePrior
from paceline.spec.curves import fit_curves

Floats = NDArray[np.float64]
MAX_DRAFT = 8


def survival_of(rate: float, length: int = MAX_DRAFT) -> Floats:
    return np.where(np.arange(MAX_DRAFT) < length, rate ** np.arange(1, MAX_DRAFT + 1), 0.0)


def offer(
    history: AcceptanceHistory, rate: float, num_rounds: int, problem: str = "problem"
) -> None:
    for _ in range(num_rounds):
        history.observe([(problem, "long")], survival_of(rate)[None])


def drafts_a_round(history: AcceptanceHistory, problem: str, gain: float) -> float:
    """Tokens to draft a round for a gain of so many."""
    curves = history.curves([(problem, "long")])
    return float(curves.drafts_needed(np.array([1 + gain]), 1.0)[0])


def test_rounds_that_draft_what_is_likelier_than_a_threshold_lie_on_the_curve() -> None:
    """Whatever the mixture of offers, for thresholds between which nothing else lies."""
    random = np.random.default_rng(0)
    offers = np.array(
        [survival_of(random.choice([0.3, 0.7, 0.97]), random.integers(0, 9)) for _ in range(4000)]
    )
    history = AcceptanceHistory()
    for one in offers:
        history.observe([("problem", "long")], one[None])
    curves = history.curves([("problem", "long")])
    for threshold in (0.9, 0.7, 0.4, 0.1):
        drafted = offers >= threshold
        spent, gained = drafted.sum() / len(offers), offers[drafted].sum() / len(offers)
        needed = curves.drafts_needed(np.array([1 + gained]), 1.0)[0]
        assert needed == pytest.approx(spent, rel=0.02)
        least = curves.last_gain(np.array([1 + gained * 0.999]), 1.0)[0]
        assert threshold <= least <= threshold + 0.1


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.integers(0, MAX_DRAFT)), max_size=30),
    st.floats(0.01, 1),
)
def test_gains_fall_and_are_worth_a_token_at_most(
    rounds: list[tuple[float, int]], factor: float
) -> None:
    history = AcceptanceHistory()
    for rate, length in rounds:
        history.observe([("problem", "short")], survival_of(rate, length)[None])
        history.age(factor)
    curves = history.curves([("problem", "short"), ("other", "short"), ("other", "long")])
    spent, gained = np.diff(curves.spent), np.diff(curves.gained)
    assert (spent >= 0).all() and (gained >= 0).all() and (gained <= spent * (1 + 1e-9)).all()
    for row in range(3):
        some = spent[row] > 1e-12
        slopes = gained[row][some] / spent[row][some]
        assert (np.diff(slopes) <= 1e-9).all()
    history.exponential_curves([("problem", "short")])  # asserts its own range


@settings(deadline=None)
@given(st.floats(0.1, 0.95), st.floats(0.1, 1), st.integers(0, 5))
def test_a_curve_is_recovered_from_noisy_points(k: float, first: float, seed: int) -> None:
    alpha = first / k
    drafted = np.linspace(0.05, 3 / alpha, 40)[None, :]
    accepted = k * (1 - np.exp(-alpha * drafted))
    noise = 0.01 * k * np.random.default_rng(seed).standard_normal(drafted.shape)
    curves = fit_curves(drafted, accepted + noise, np.ones_like(drafted))
    assert curves.k[0] == pytest.approx(k, rel=0.05)
    assert curves.alpha[0] == pytest.approx(alpha, rel=0.1)


def test_every_row_is_fitted_by_itself_and_weights_count() -> None:
    drafted = np.tile(np.linspace(0.1, 3, 20), (3, 1))
    accepted = np.array([[0.3], [0.6], [0.6]]) * (1 - np.exp(-drafted))
    weights = np.ones_like(drafted)
    accepted[2, 5], weights[2, 5] = 0.0, 0.0
    curves = fit_curves(drafted, accepted, weights)
    assert curves.k == pytest.approx([0.3, 0.6, 0.6], rel=0.01)
    assert curves.alpha == pytest.approx([1, 1, 1], rel=0.01)


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.6, 0.8])
def test_the_exponential_of_das_comes_within_an_eighth_of_what_whole_drafts_gain(
    rate: float,
) -> None:
    history = AcceptanceHistory()
    offer(history, rate, 4000)
    fitted = history.exponential_curves([("problem", "long")])
    spent = np.arange(1, MAX_DRAFT + 1)
    gained = survival_of(rate).cumsum()
    share = fitted.accepted(spent / (1 + gained), np.ones(MAX_DRAFT))
    assert share == pytest.approx(gained / (1 + gained), rel=0.125)


def test_an_unknown_problem_is_its_class_and_an_unknown_class_is_the_prior() -> None:
    history = AcceptanceHistory(AcceptancePrior(rate=0.3))
    assert drafts_a_round(history, "new", 0.3) == pytest.approx(1)
    offer(history, 0.9, 1000, problem="known")
    assert drafts_a_round(history, "new", 0.9) == pytest.approx(1, abs=0.1)
    offer(history, 0.1, 200, problem="hard")
    assert drafts_a_round(history, "hard", 0.2) > 2
    assert drafts_a_round(history, "known", 0.9) == pytest.approx(1, abs=0.1)


def test_ageing_lets_new_weights_speak_and_forgets_problems_not_seen_again() -> None:
    aged, whole = AcceptanceHistory(), AcceptanceHistory()
    for history, factor in ((aged, 0.1), (whole, 1.0)):
        offer(history, 0.9, 300)
        history.age(factor)
        offer(history, 0.3, 60)
    most = [history.curves([("problem", "long")]).gained[0, -1] for history in (aged, whole)]
    assert most[0] < 0.6 * most[1]
    for _ in range(10):
        aged.age(0.1)
    assert aged.num_problems == 0
