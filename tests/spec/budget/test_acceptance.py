"""Curves of what drafts gain and cost are learned from what rounds were offered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline.spec.budget.acceptance import AcceptanceHistory, AcceptancePrior

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
