"""Draft budgets against brute force, and the laws that both objectives promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline.spec.budget.budget import (
    RoundLimits,
    makespan_budget,
    makespan_seconds,
    throughput_drafts,
    within_batch,
)
from paceline.spec.budget.cost_model import StepCosts
from paceline.spec.budget.curves import Curves, RoundCurves
from tests.spec.budget.curve_forms import ExponentialCurves
from tests.spec.budget.curve_forms import round_curves as curves_of_rounds

Floats = NDArray[np.float64]
Batch = tuple[Floats, Curves, StepCosts]


def probabilities(shape: tuple[int, int], least: float = 0.0) -> st.SearchStrategy[Floats]:
    row = st.lists(st.floats(least, 1), min_size=shape[1], max_size=shape[1])
    return st.lists(row, min_size=shape[0], max_size=shape[0]).map(np.array)


def exponential_curves(num_requests: int) -> st.SearchStrategy[ExponentialCurves]:
    return st.builds(
        lambda k, first: ExponentialCurves(0.97 * k[0], first[0] / np.maximum(0.97 * k[0], 0.05)),
        probabilities((1, num_requests)),
        probabilities((1, num_requests), least=0.05),
    )


def round_curves(num_requests: int) -> st.SearchStrategy[RoundCurves]:
    return st.builds(
        lambda offered, held: curves_of_rounds(offered.cumprod(1), held.cumprod(1)),
        probabilities((num_requests, 5), least=0.1),
        probabilities((num_requests, 5)),
    )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    lengths = np.array(draw(st.lists(st.floats(1, 5000), min_size=1, max_size=6)))
    costs = StepCosts(draw(st.floats(0, 30)), draw(st.floats(0.01, 3)))
    curves = draw(st.one_of(exponential_curves(len(lengths)), round_curves(len(lengths))))
    return lengths, curves, costs


def drafts_by_search(curves: Curves, lengths: Floats, rounds: Floats) -> Floats:
    """Fewest drafts [r, m] for each of ``rounds`` [r], by bisection on what drafts come to."""
    late = lengths[None, :] - rounds[:, None]
    low, high = np.zeros((2, len(rounds), len(lengths)))
    if isinstance(curves, ExponentialCurves):
        high += 40 * lengths / curves.alpha
    else:
        assert isinstance(curves, RoundCurves)
        high += rounds[:, None] * curves.spent[:, -1]

    def enough(drafts: Floats) -> NDArray[np.bool_]:
        if isinstance(curves, ExponentialCurves):
            return curves.accepted(drafts, lengths) >= late
        assert isinstance(curves, RoundCurves)
        per_round = drafts / rounds[:, None]
        gained = [
            np.interp(per_round[:, i], spent, curves.gained[i])
            for i, spent in enumerate(curves.spent)
        ]
        return (1 + np.stack(gained, axis=1)) * rounds[:, None] >= lengths * (1 - 1e-12)

    reachable = enough(high)
    for _ in range(60):
        middle = (low + high) / 2
        is_enough = enough(middle)
        low, high = np.where(is_enough, low, middle), np.where(is_enough, middle, high)
    return np.where(late <= 0, 0.0, np.where(reachable, high, np.inf))


def least_on_a_grid(batch: Batch, own: bool, limits: RoundLimits) -> float:
    """The least seconds over 4000 makespans."""
    lengths, curves, costs = batch
    rounds = np.unique(np.concatenate([np.linspace(0.002, 1, 4000) * lengths.max(), lengths]))
    drafts = drafts_by_search(curves, lengths, rounds)
    per_round = drafts / rounds[:, None]
    legal = (per_round <= limits.request).all(1) & (per_round.sum(1) <= limits.batch)
    legal &= np.isfinite(drafts).all(1)
    own_tokens = np.minimum(lengths, rounds[:, None]).sum(1) if own else 0.0
    seconds = costs.base * rounds + costs.token * (drafts.sum(1) + own_tokens)
    return float(seconds[legal].min())


@given(batches(), st.floats(0.05, 1))
def test_the_drafts_needed_are_just_enough_to_finish_in_time(batch: Batch, share: float) -> None:
    lengths, curves, _ = batch
    rounds = share * float(lengths.max())
    ours, searched = (
        curves.drafts_needed(lengths, rounds),
        drafts_by_search(curves, lengths, np.array([rounds]))[0],
    )
    assert (ours[lengths <= rounds] == 0).all()
    certain = np.isfinite(ours) & np.isfinite(searched)
    assert ours[certain] == pytest.approx(searched[certain], rel=1e-5, abs=1e-5)
    beyond = curves.drafts_needed(lengths, rounds * (1 + 1e-6))
    assert np.isinf(searched[np.isinf(ours) & np.isinf(beyond)]).all()


@given(batches(), st.floats(0.05, 1))
def test_what_a_round_saves_is_the_slope_of_the_drafts_needed(batch: Batch, share: float) -> None:
    lengths, curves, _ = batch
    rounds = share * float(lengths.max())
    before, after = (
        curves.drafts_needed(lengths, rounds * factor) for factor in (1 - 1e-5, 1 + 1e-5)
    )
    with np.errstate(invalid="ignore"):
        slope = (before - after) / (2e-5 * rounds)
    saved = curves.saved_by_a_round(lengths, rounds)
    low, high = (curves.saved_by_a_round(lengths, rounds * f) for f in (1 + 2e-5, 1 - 2e-5))
    for i in np.flatnonzero(np.isfinite(before)):
        if high[i] == pytest.approx(low[i], rel=0.01):  # not at a kink
            assert saved[i] == pytest.approx(slope[i], rel=0.02, abs=1e-3)


def test_the_solution_printed_in_das_does_not_finish_in_the_rounds_it_is_for() -> None:
    length, k, alpha, rounds = 100.0, 0.6, 1.0, 60.0
    curve = ExponentialCurves(np.array([k]), np.array([alpha]))
    printed = np.array([-(length / alpha) * np.log(1 - k * (1 - rounds / length))])
    lengths = np.array([length])
    ours = curve.drafts_needed(lengths, rounds)
    assert length - curve.accepted(printed, lengths)[0] == pytest.approx(85.6)
    assert length - curve.accepted(ours, lengths)[0] == pytest.approx(60.0)


@given(
    batches(), st.booleans(), st.sampled_from([np.inf, 8.0, 1.0]), st.sampled_from([np.inf, 4.0])
)
def test_no_makespan_on_a_grid_is_better(
    batch: Batch, own: bool, request: float, together: float
) -> None:
    lengths, curves, costs = batch
    limits = RoundLimits(request, together)
    budget = makespan_budget(lengths, curves, costs, limits, count_own_tokens=own)
    best = least_on_a_grid(batch, own, limits)
    assert budget.seconds <= best * (1 + 1e-5)
    assert budget.seconds >= best * (1 - 0.01)  # the grid is not much worse either


@given(
    batches(), st.booleans(), st.sampled_from([np.inf, 8.0, 1.0]), st.sampled_from([np.inf, 4.0])
)
def test_a_makespan_budget_is_feasible_within_its_limits_and_never_worse_than_none(
    batch: Batch, own: bool, request: float, together: float
) -> None:
    lengths, curves, costs = batch
    budget = makespan_budget(
        lengths, curves, costs, RoundLimits(request, together), count_own_tokens=own
    )
    assert (budget.drafts >= 0).all()
    enough = drafts_by_search(curves, lengths, np.array([budget.rounds * (1 + 1e-6)]))[0]
    assert (budget.drafts >= enough * (1 - 1e-4) - 1e-4).all()
    assert budget.per_round.max() <= request * (1 + 1e-6)
    assert budget.per_round.sum() <= together * (1 + 1e-6)
    assert (budget.drafts[lengths <= budget.rounds] == 0).all()
    assert budget.seconds <= budget.plain_seconds
    assert budget.seconds == pytest.approx(
        makespan_seconds(lengths, budget.drafts, budget.rounds, costs, count_own_tokens=own)
    )


@given(
    st.lists(st.floats(10, 5000), min_size=1, max_size=6).map(np.array),
    st.floats(0.3, 0.95),
    st.floats(0.5, 1),
    st.floats(1, 30),
    st.booleans(),
)
def test_at_a_smooth_optimum_a_round_costs_what_the_drafts_that_save_it_cost(
    lengths: Floats, k: float, first: float, base: float, own: bool
) -> None:
    alpha = first / k
    curves = ExponentialCurves(np.full(len(lengths), k), np.full(len(lengths), alpha))
    costs = StepCosts(base, 0.1)
    budget = makespan_budget(lengths, curves, costs, count_own_tokens=own)
    rounds = budget.rounds
    late = lengths > rounds * (1 + 1e-4)
    left = k - 1 + rounds / lengths[late]
    price = costs.base + (costs.token * late.sum() if own else 0)
    saved = costs.token * (1 / (alpha * left)).sum()
    if (np.abs(lengths / rounds - 1) > 1e-4).all():
        assert price == pytest.approx(saved, rel=0.01)
    else:  # at a kink, where a request begins to draft, the slope changes its sign
        at_kink = np.count_nonzero(np.abs(lengths / rounds - 1) <= 1e-4)
        saved_below = saved + at_kink * costs.token / first
        assert saved <= price * 1.01
        assert saved_below >= (price + (costs.token * at_kink if own else 0)) * 0.99


@given(batches(), st.floats(1, 4))
def test_dearer_rounds_mean_fewer_of_them_and_more_drafts(batch: Batch, factor: float) -> None:
    lengths, curves, costs = batch
    cheap = makespan_budget(lengths, curves, costs)
    dear = makespan_budget(lengths, curves, StepCosts(costs.base * factor, costs.token))
    assert dear.rounds <= cheap.rounds * (1 + 1e-5)
    assert (dear.drafts >= cheap.drafts * (1 - 1e-3) - 1e-2 * lengths).all()


@given(batches(), st.floats(0.05, 0.95), st.floats(0.05, 1))
def test_of_two_alike_requests_the_longer_drafts_more(batch: Batch, k: float, first: float) -> None:
    lengths, _, costs = batch
    alike = ExponentialCurves(np.full(len(lengths), k), np.full(len(lengths), first / k))
    budget = makespan_budget(lengths, alike, costs)
    in_order = budget.drafts[np.argsort(lengths, kind="stable")]
    assert (np.diff(in_order) >= -1e-9).all()


def test_budgets_by_rounds_are_the_best_of_all_drafts_in_a_simulation() -> None:
    """Two requests of 60 and 20 tokens, expectations for luck; whole drafts held throughout."""
    survival = np.cumprod(np.full((2, 4), 0.7), axis=1)
    costs = StepCosts(9.0, 0.55)
    gained = np.concatenate([[0.0], np.cumsum(survival[0])])

    def seconds(drafts: tuple[int, int]) -> float:
        rounds = np.array([60.0, 20.0]) / (1 + gained[list(drafts)])
        return float(costs.base * rounds.max() + costs.token * (rounds @ (1 + np.array(drafts))))

    best = min(seconds(drafts) for drafts in itertools.product(range(5), repeat=2))
    curves = curves_of_rounds(np.ones((2, 4)), survival)
    budget = makespan_budget(np.array([60.0, 20.0]), curves, costs)
    assert budget.seconds <= best * (1 + 1e-5)
    assert budget.seconds >= 0.97 * best  # fractions of a token save little


@pytest.mark.parametrize("limits", [RoundLimits(batch=6.0), RoundLimits(request=1.5)])
def test_where_a_limit_binds_it_is_used_up(limits: RoundLimits) -> None:
    lengths = np.linspace(500, 1000, 4)
    curves = ExponentialCurves(np.full(4, 0.9), np.full(4, 1.1))
    costs = StepCosts(30.0, 0.1)
    free = makespan_budget(lengths, curves, costs).per_round
    assert free.sum() > 12 and free.max() > 3
    per_round = makespan_budget(lengths, curves, costs, limits).per_round
    used = per_round.sum() if np.isfinite(limits.batch) else per_round.max()
    assert used == pytest.approx(min(limits.batch, limits.request), rel=1e-4)


def best_uniform(
    lengths: Floats, curves: ExponentialCurves, costs: StepCosts, scale: Floats, own: bool
) -> float:
    def seconds(drafts: Floats) -> float:
        rounds = lengths - curves.accepted(drafts, lengths)
        tokens = drafts.sum() + (rounds.sum() if own else 0)
        return float(costs.base * rounds.max() + costs.token * tokens)

    return min(seconds(share * scale) for share in np.geomspace(1e-3, 20, 200))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_on_a_long_tailed_batch_budgets_by_length_beat_the_best_uniform_one_and_that_none(
    seed: int, own: bool
) -> None:
    lengths = np.random.default_rng(seed).lognormal(6, 1, 128)
    curves = ExponentialCurves(np.full(128, 0.6), np.full(128, 1.5))
    costs = StepCosts(40.0, 1.0)
    budget = makespan_budget(lengths, curves, costs, count_own_tokens=own)
    uniform = min(
        best_uniform(lengths, curves, costs, scale, own)
        for scale in (lengths, np.full(128, lengths.mean()))
    )
    assert budget.seconds < 0.9 * uniform
    assert uniform < 0.99 * budget.plain_seconds
    assert 0 < np.count_nonzero(budget.drafts) < 64  # most draft nothing at all


survivals = st.integers(1, 3).flatmap(
    lambda m: st.lists(
        st.lists(st.floats(0, 1), min_size=3, max_size=3).map(np.cumprod), min_size=m, max_size=m
    ).map(np.array)
)
step_costs = st.builds(StepCosts, st.floats(0, 20), st.floats(0.01, 3))


@given(survivals, step_costs, st.data())
def test_no_drafts_make_more_tokens_a_second(
    survival: Floats, costs: StepCosts, data: st.DataObject
) -> None:
    m, longest = survival.shape
    offered = np.array(data.draw(st.lists(st.integers(0, longest), min_size=m, max_size=m)))
    limit = data.draw(st.integers(0, m * longest))

    def rate(drafts: tuple[int, ...]) -> float:
        gained = [survival[i, :d].sum() for i, d in enumerate(drafts)]
        return float(sum(gained) + m) / costs.seconds(m + sum(drafts))

    every = itertools.product(*(range(int(most) + 1) for most in offered))
    best = max(rate(drafts) for drafts in every if sum(drafts) <= limit)
    is_offered = np.arange(longest) < offered[:, None]
    budget = throughput_drafts(np.where(is_offered, survival, 0), costs, limit)
    assert budget.rate == pytest.approx(best)
    assert budget.rate == pytest.approx(rate(tuple(budget.drafts)))
    assert budget.rate >= rate((0,) * m) * (1 - 1e-9)
    assert (budget.drafts <= offered).all() and budget.drafts.sum() <= limit


@given(survivals, step_costs)
def test_a_token_is_drafted_iff_it_is_worth_more_than_its_time(
    survival: Floats, costs: StepCosts
) -> None:
    budget = throughput_drafts(survival, costs)
    price = budget.rate * costs.token
    is_drafted = np.arange(survival.shape[1]) < budget.drafts[:, None]
    assert (survival[is_drafted] >= price * (1 - 1e-9)).all()
    assert (survival[~is_drafted] <= price * (1 + 1e-9)).all()


def test_the_larger_the_batch_the_shorter_the_drafts() -> None:
    survival = np.cumprod(np.full((1, 16), 0.8), axis=1)
    costs = StepCosts(9.0, 0.55)  # measured on vLLM
    drafts = [
        throughput_drafts(np.repeat(survival, m, axis=0), costs).drafts[0] for m in (1, 4, 16, 64)
    ]
    assert drafts == sorted(drafts, reverse=True) and drafts[0] >= 5 and drafts[-1] <= 1


def test_what_is_too_much_for_a_batch_is_cut_from_the_longest() -> None:
    assert within_batch(np.array([5, 1, 3]), 6).tolist() == [3, 1, 2]
    assert within_batch(np.array([5, 1, 3]), 9).tolist() == [5, 1, 3]
    assert within_batch(np.array([5, 1, 3]), 0).tolist() == [0, 0, 0]


@given(st.integers(0, 50), st.floats(0.05, 0.95))
def test_the_last_token_of_a_budget_gains_as_much_as_one_more_would(
    seed: int, share: float
) -> None:
    """By differences of the drafts needed: dA/dp where A = l - N."""
    random = np.random.default_rng(seed)
    held = np.sort(random.random((3, 6)))[:, ::-1].cumprod(1)
    lengths = random.uniform(50, 500, 3)
    rounds_curves = curves_of_rounds(np.ones((3, 6)), held)
    k, alpha = random.uniform(0.3, 0.9, 3), random.uniform(0.2, 1, 3)
    for curves in (rounds_curves, ExponentialCurves(k, alpha)):
        rounds = float(lengths.max()) * (0.7 + 0.3 * share)
        needed = curves.drafts_needed(lengths, rounds)
        gain = curves.last_gain(lengths, rounds)
        for i in range(3):
            if lengths[i] <= rounds:
                assert gain[i] == np.inf and needed[i] == 0
                continue
            if not np.isfinite(needed[i]):
                continue
            # One token more to gain at as many rounds: a request that is one token longer.
            longer = lengths.copy()
            longer[i] += 1e-4
            more = curves.drafts_needed(longer, rounds)[i] - needed[i]
            if isinstance(curves, RoundCurves):
                assert 1e-4 / more == pytest.approx(gain[i], rel=1e-3)
            else:
                shorter = curves.drafts_needed(lengths, rounds - 1e-4)[i] - needed[i]
                assert 1e-4 / shorter == pytest.approx(gain[i], rel=1e-2)
