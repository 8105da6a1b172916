"""Gains and costs of drafts by problem and length class, learned online (pure).

Each round the drafter proposes tokens for a request. The probability of each to be accepted, with
all before it, is estimated (``confidence.py``). Drafting all tokens above a threshold spends their
number a round, and gains the sum of their probabilities. Counted by probability over the proposals
of every round, verified or not, this is the curve E of a budget (``RoundCurves``): gains a round by
drafts a round, from the likeliest tokens to all that are proposed.

A problem's counts are shrunk towards its class's, those towards all rounds', those towards the
prior. So a new problem has its class's curve.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.spec.budget.curves import RoundCurves

Floats = NDArray[np.float64]

THRESHOLDS = np.array([0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
"""Lower bounds of bins: a token is in the first whose bound its probability reaches."""
_ASCENDING = THRESHOLDS[::-1]
_NUM_BINS = len(THRESHOLDS)


@dataclass(frozen=True)
class AcceptancePrior:
    """Assumption before any round: ``length`` tokens are proposed, S_j = ``rate``^j.

    ``strength`` is how many rounds the prior counts as: for all rounds together, for a length
    class against all, and for a problem against its class.
    """

    rate: float = 0.5
    length: int = 4
    strength: float = 4.0


@dataclass
class _Counts:
    """Rounds, and by threshold [2, 12] proposed tokens and sums of their probabilities."""

    rounds: float
    tokens: Floats

    def add(self, rounds: float, tokens: Floats) -> None:
        self.rounds += rounds
        self.tokens += tokens


def _by_threshold(survival: Floats) -> Floats:
    """Count proposed tokens and sum their probabilities by threshold, [m, 2, 12]; 0 is no token."""
    proposed = survival > 0
    bins = _NUM_BINS - np.searchsorted(_ASCENDING, survival, side="right")
    cells = (np.arange(len(survival))[:, None] * _NUM_BINS + bins)[proposed]
    size = len(survival) * _NUM_BINS
    counts = np.empty((2, size))
    counts[0] = np.bincount(cells, minlength=size)
    counts[1] = np.bincount(cells, survival[proposed], size)
    return counts.reshape(2, len(survival), _NUM_BINS).swapaxes(0, 1)


class AcceptanceHistory:
    """Proposals by problem, by length class and of all together."""

    def __init__(self, prior: AcceptancePrior | None = None) -> None:
        self._prior = prior or AcceptancePrior()
        self._assumed = _by_threshold(
            np.cumprod(np.full((1, self._prior.length), self._prior.rate), axis=1)
        )[0]
        self._all = _Counts(0.0, np.zeros((2, _NUM_BINS)))
        self._classes: dict[Hashable, _Counts] = {}
        self._problems: dict[Hashable, _Counts] = {}

    @property
    def num_problems(self) -> int:
        """Problems with counts of their own."""
        return len(self._problems)

    def observe(self, requests: Sequence[tuple[Hashable, Hashable]], survival: Floats) -> None:
        """Count a round's proposals for each (problem, length class).

        ``survival`` [m, d] is the probability that the first j tokens are accepted, 0 beyond the
        end of a proposal.
        """
        proposals = _by_threshold(survival)
        self._all.add(len(requests), proposals.sum(axis=0))
        for (problem, length_class), proposal in zip(requests, proposals, strict=True):
            _counts(self._classes, length_class).add(1, proposal)
            _counts(self._problems, problem).add(1, proposal)

    def age(self, factor: float) -> None:
        """Scale all counts by ``factor``, since the weights changed. A problem with less than half
        a round left is forgotten."""
        for counts in (self._all, *self._classes.values(), *self._problems.values()):
            counts.rounds *= factor
            counts.tokens *= factor
        self._problems = {key: c for key, c in self._problems.items() if c.rounds >= 0.5}

    def curves(self, requests: Sequence[tuple[Hashable, Hashable]]) -> RoundCurves:
        """Return what rounds of each (problem, length class) spend and gain, for budgets."""
        known: dict[tuple[Hashable, Hashable], Floats] = {}
        for request in requests:
            if request not in known:
                known[request] = self._a_round(*request)
        points = np.stack([known[request] for request in requests]).cumsum(axis=2)
        points = np.concatenate([np.zeros((len(requests), 2, 1)), points], axis=2)
        return RoundCurves(spent=points[:, 0], gained=points[:, 1])

    def _a_round(self, problem: Hashable, length_class: Hashable) -> Floats:
        """Return proposed tokens a round and their probabilities by threshold, [2, 12]."""
        strength, mean = self._prior.strength, self._assumed
        for counts in (
            self._all,
            self._classes.get(length_class),
            self._problems.get(problem),
        ):
            if counts is not None:
                mean = (counts.tokens + strength * mean) / (counts.rounds + strength)
        return mean


def _counts(table: dict[Hashable, _Counts], key: Hashable) -> _Counts:
    if key not in table:
        table[key] = _Counts(0.0, np.zeros((2, _NUM_BINS)))
    return table[key]
