"""Budgets: how much to draft for each request, by two objectives, solved exactly (pure).

A step of n tokens takes c_base + c_tok·n seconds (``cost_model.py``); n is one token for each live
request, and the drafts. To take N rounds, a request of l_i tokens must draft p_i*(N) in total
(``curves.py``, which also says what is wrong in the paper).

**Makespan**, for a batch that is waited for as a whole (``makespan_budget``). DAS states::

    minimise   c_base·N + c_tok·Σ p_i     subject to   l_i - A_i(p_i) <= N for all i

With p_i = p_i*(N), 0 for l_i <= N, the sum is one-dimensional and convex, and at its minimum, where
no limit binds, c_base = -c_tok Σ dp_i*/dN. For the exponential

    p_i*(N) = -(l_i/α_i) ln(1 - (1 - N/l_i)/k_i)
    c_base  = c_tok Σ_{l_i > N} 1 / (α_i (k_i - 1 + N/l_i))

N is found by bisection on that derivative. Requests shorter than N draft nothing.

DAS leaves out that each live request forwards a token of its own each round, which drafting saves.
With ``count_own_tokens`` (the default) the objective is what the steps really take,

    c_base·N + c_tok·Σ (p_i + min(l_i, N)),

which adds c_tok·|{i: l_i > N}| to the left of the condition. It is convex as long as no draft gains
more tokens than it has.

**Throughput**, where requests keep coming (``throughput_drafts``). In asynchronous mode nothing
waits for a batch of rollouts as a whole: as one request ends, another takes its place, and what
counts is tokens a second. With S_ij the probability that i's first j tokens are accepted,

    maximise   R(d) = Σ_i (1 + Σ_{j <= d_i} S_ij) / (c_base + c_tok (m + Σ_i d_i))

A token is worth drafting iff S_ij > R* c_tok: more than its time would yield at the best rate
(Dinkelbach 1967, *On nonlinear fractional programming*). Freshness needs no objective of its own:
the ledger bounds it whatever is drafted, and faster samples are younger when trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.spec.budget.cost_model import StepCosts
from paceline.spec.budget.curves import Curves

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PRECISION = 1e-6
"""Relative precision of N; costs are flat around the optimum."""


@dataclass(frozen=True)
class RoundLimits:
    """Most tokens that one round may draft: for a request, and for the whole batch."""

    request: float = np.inf
    batch: float = np.inf


@dataclass(frozen=True)
class MakespanBudget:
    """``drafts`` [m] in total over the ``rounds`` that the batch takes; seconds with and without.

    A request drafts in all ``rounds``, or until its own end. A token is worth drafting for it iff
    it is accepted with a probability of ``least`` [m] or more.
    """

    rounds: float
    drafts: Floats
    least: Floats
    seconds: float
    plain_seconds: float

    @property
    def per_round(self) -> Floats:
        """Drafted tokens a round, float64 [m], fractions."""
        return self.drafts / self.rounds


def makespan_seconds(
    lengths: Floats, drafts: Floats, rounds: float, costs: StepCosts, count_own_tokens: bool = True
) -> float:
    """Return seconds until the last request is done, by the cost model."""
    own = np.minimum(lengths, rounds).sum() if count_own_tokens else 0.0
    return float(costs.base * rounds + costs.token * (drafts.sum() + own))


def makespan_budget(
    lengths: Floats,
    curves: Curves,
    costs: StepCosts,
    limits: RoundLimits | None = None,
    count_own_tokens: bool = True,
) -> MakespanBudget:
    """Return the drafts that end the batch soonest; ``lengths`` [m >= 1] > 0 are still to come."""
    limits = limits or RoundLimits()
    longest = float(lengths.max())

    def falls_short(rounds: float) -> bool:
        """Tell whether more rounds are needed, or would take fewer seconds."""
        if not _within(limits, curves.drafts_needed(lengths, rounds) / rounds):
            return True
        own = np.count_nonzero(lengths > rounds) if count_own_tokens else 0
        saved = curves.saved_by_a_round(lengths, rounds).sum()
        return bool(costs.base + costs.token * (own - saved) < 0)

    low, high = 0.0, longest  # high is always feasible, at first without drafts
    while high - low > PRECISION * longest:
        middle = (low + high) / 2
        low, high = (middle, high) if falls_short(middle) else (low, middle)
    drafts = curves.drafts_needed(lengths, high)
    plain = makespan_seconds(
        lengths, np.zeros_like(lengths), longest, costs, count_own_tokens=count_own_tokens
    )
    seconds = makespan_seconds(lengths, drafts, high, costs, count_own_tokens=count_own_tokens)
    if seconds >= plain:
        nothing, never = np.zeros_like(lengths), np.full_like(lengths, np.inf)
        return MakespanBudget(longest, nothing, never, plain, plain)
    return MakespanBudget(high, drafts, curves.last_gain(lengths, high), seconds, plain)


def _within(limits: RoundLimits, per_round: Floats) -> bool:
    return bool(
        np.isfinite(per_round).all()
        and per_round.max() <= limits.request
        and per_round.sum() <= limits.batch
    )


@dataclass(frozen=True)
class ThroughputBudget:
    """``drafts`` [m] for this round, and the tokens a second that are expected of it."""

    drafts: Integers
    rate: float


def throughput_drafts(
    survival: Floats,
    costs: StepCosts,
    batch_limit: int | None = None,
) -> ThroughputBudget:
    """Return the drafts of one round that make the most tokens a second.

    ``survival`` [m, d] holds S_ij, not rising in j, 0 where the drafter has no token.
    ``batch_limit`` is the most tokens that the round may draft for all.
    """
    num_requests, longest = survival.shape
    assert num_requests, "a round has requests"
    # Any best drafts take the likeliest tokens first; the best number of them maximises R.
    order = np.argsort(-survival, axis=None, kind="stable")
    most = min(
        int(np.count_nonzero(survival > 0)), survival.size if batch_limit is None else batch_limit
    )
    chosen = order[:most]
    tokens = num_requests + np.concatenate([[0.0], np.cumsum(survival.ravel()[chosen])])
    rates = tokens / (costs.base + costs.token * (num_requests + np.arange(most + 1)))
    best = int(rates.argmax())
    drafts = np.bincount(chosen[:best] // longest, minlength=num_requests)
    return ThroughputBudget(drafts.astype(np.int64), float(rates[best]))


def within_batch(drafts: Integers, limit: int) -> Integers:
    """Cut last tokens off the longest ``drafts`` [m], so that at most ``limit`` are left."""
    if drafts.sum() <= limit:
        return drafts
    positions = np.concatenate([np.arange(count) for count in drafts])
    owners = np.repeat(np.arange(len(drafts)), drafts)
    kept = owners[np.argsort(positions, kind="stable")[:limit]]
    return np.bincount(kept, minlength=len(drafts)).astype(np.int64)
