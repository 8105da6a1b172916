"""Acceptance: recovered from verified drafts, whatever their lengths were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline.spec.acceptance import AcceptanceHistory, AcceptancePrior
from paceline.spec.curves import ExponentialCurves, fit_curves

MAX_DRAFT = 8


def accepted_of(random: np.random.Generator, rates: NDArray[np.float64], offered: int) -> int:
    """Tokens accepted where the j-th is with probability ``rates[j]`` after those before it."""
    held = random.random(offered) < rates[:offered]
    return int(np.cumprod(held).sum())


def verify_rounds(
    history: AcceptanceHistory,
    rates: NDArray[np.float64],
    num_rounds: int,
    problem: str = "problem",
    share_offered: float = 1.0,
    seed: int = 0,
) -> None:
    random = np.random.default_rng(seed)
    for _ in range(num_rounds):
        offered = MAX_DRAFT if random.random() < share_offered else 0
        drafted = min(offered, int(random.integers(1, MAX_DRAFT + 1)))
        accepted = accepted_of(random, rates, drafted)
        history.observe(problem, "long", offered, drafted, accepted)


def test_survival_is_recovered_from_drafts_of_any_length() -> None:
    rates = np.array([0.9, 0.8, 0.8, 0.7, 0.9, 0.9, 0.6, 0.9])
    history = AcceptanceHistory(MAX_DRAFT)
    verify_rounds(history, rates, 4000)
    assert history.survival("problem", "long") == pytest.approx(np.cumprod(rates), abs=0.05)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(*[st.integers(0, MAX_DRAFT)] * 3).map(sorted),
        max_size=30,
    )
)
def test_survival_never_rises_and_is_a_probability(rounds: list[list[int]]) -> None:
    history = AcceptanceHistory(MAX_DRAFT)
    for accepted, drafted, offered in rounds:
        history.observe("problem", "short", offered, drafted, accepted)
    survival = history.survival("problem", "short")
    assert (np.diff(survival) <= 0).all() and survival[-1] > 0 and survival[0] <= 1
    curves = history.curves([("problem", "short")])
    slopes = np.diff(curves.gained[0]) / np.diff(curves.spent[0])
    assert (np.diff(slopes) <= 1e-9).all() and slopes[0] <= 1
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


@pytest.mark.parametrize("share_offered", [1.0, 0.4])
@pytest.mark.parametrize("rate", [0.4, 0.8, 0.95])
def test_curves_say_how_many_rounds_and_drafts_a_request_takes(
    rate: float, share_offered: float
) -> None:
    rates = np.full(MAX_DRAFT, rate)
    history = AcceptanceHistory(MAX_DRAFT)
    verify_rounds(history, rates, 4000, share_offered=share_offered)
    curves = history.curves([("problem", "long")])
    random = np.random.default_rng(7)
    for draft in (1, 3, 6):
        length, drafts, done, rounds = 20_000, 0, 0, 0
        while done < length:
            offered = draft if random.random() < share_offered else 0
            done, drafts, rounds = (
                done + 1 + accepted_of(random, rates, offered),
                drafts + offered,
                rounds + 1,
            )
        at_most = curves.drafts_needed(np.array([float(done)]), rounds * 1.03)[0]
        at_least = curves.drafts_needed(np.array([float(done)]), rounds * 0.97)[0]
        assert at_most <= drafts * 1.05
        assert at_least >= drafts * 0.95


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.6, 0.8])
def test_the_exponential_of_das_comes_within_an_eighth_of_what_whole_drafts_gain(
    rate: float,
) -> None:
    history = AcceptanceHistory(MAX_DRAFT)
    verify_rounds(history, np.full(MAX_DRAFT, rate), 4000)
    exact = history.curves([("problem", "long")])
    fitted = history.exponential_curves([("problem", "long")])
    put_out = 1 + exact.gained[0, 1:]
    share = fitted.accepted(exact.spent[0, 1:] / put_out, np.ones(MAX_DRAFT))
    assert share == pytest.approx(exact.gained[0, 1:] / put_out, rel=0.125)


def test_an_unknown_problem_is_its_class_and_an_unknown_class_is_the_prior() -> None:
    history = AcceptanceHistory(MAX_DRAFT, AcceptancePrior(rate=0.3))
    prior = 0.3 ** np.arange(1, MAX_DRAFT + 1)
    assert history.survival("new", "long") == pytest.approx(prior)
    verify_rounds(history, np.full(MAX_DRAFT, 0.9), 1000, problem="known")
    assert history.survival("new", "long")[0] == pytest.approx(0.9, abs=0.03)
    verify_rounds(history, np.full(MAX_DRAFT, 0.1), 200, problem="hard")
    assert history.survival("hard", "long")[0] < 0.2
    assert history.survival("known", "long")[0] > 0.8


def test_ageing_lets_new_weights_speak_and_forgets_problems_not_seen_again() -> None:
    aged, whole = AcceptanceHistory(MAX_DRAFT), AcceptanceHistory(MAX_DRAFT)
    for history, factor in ((aged, 0.1), (whole, 1.0)):
        verify_rounds(history, np.full(MAX_DRAFT, 0.9), 300)
        history.age(factor)
        verify_rounds(history, np.full(MAX_DRAFT, 0.2), 100)
    aged_first = aged.survival("problem", "long")[0]
    assert aged_first < whole.survival("problem", "long")[0] and aged_first < 0.4
    for _ in range(12):
        aged.age(0.5)
    assert aged.num_problems == 0


@settings(deadline=None)
@given(st.floats(0, 0.99), st.floats(0.05, 1), st.floats(1, 1000), st.floats(0, 4000))
def test_a_request_never_accepts_more_than_it_drafted_or_than_k_of_its_length(
    k: float, first: float, length: float, drafts: float
) -> None:
    curves = ExponentialCurves(np.array([k]), np.array([first / max(k, 0.05)]))
    accepted = curves.accepted(np.array([drafts]), np.array([length]))[0]
    assert 0 <= accepted <= min(drafts, k * length) * (1 + 1e-9)
