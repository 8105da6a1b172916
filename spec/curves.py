"""How drafts turn into accepted tokens over a whole request: DAS's exponential, and exactly (pure).

A request that still has l tokens to go, drafts p tokens over them and has A(p) of them accepted
takes l - A(p) rounds. Budgets need the inverse: the fewest drafts p*(N) with which it takes N
rounds, and what one round more saves, -dp*/dN. Both forms give these; p* is convex in N.

``ExponentialCurves`` is the form of DAS (arXiv 2511.13841): two numbers a request,

    A(p) = k l (1 - e^{-α p/l}),        p*(N) = -(l/α) ln(1 - (1 - N/l)/k)   for l (1-k) < N < l

k is the share of the output that drafts can supply at all, kα what the first drafted token is
worth. *The p* printed in the paper is wrong*: it has k (1 - N/l) in the logarithm where (1 - N/l)/k
belongs. From l - k l (1 - e^{-αp/l}) = N follows 1 - e^{-αp/l} = (1 - N/l)/k. As k < 1, k (1 - N/l)
is the smaller number: the printed budgets are too small to finish in the N rounds they were
computed for, and never become infinite at the N that no draft can reach.

``RoundCurves`` has no form: from E(d), what a round gains by drafting d tokens, follows that N
rounds make l tokens iff each gains l/N - 1, so that

    p*(N) = N · D(l/N - 1),             D the inverse of E

E is concave, linear between its points. Where each token of a draft is accepted with the same
probability r, E has no exponential as its A: for r = 0.95 the best fit needs about twice the true
drafts (k = 1, α = 1 against D); for r <= 0.8 it errs by up to an eighth in A at whole drafts, and
promises up to a third too much for drafts of a token in every few rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LARGEST_K = 0.995
ALPHA_GRID = np.geomspace(0.02, 50.0, 64)


class Curves(Protocol):
    """What m requests must draft; ``lengths`` [m] > 0 are the tokens they still have to go."""

    def drafts_needed(self, lengths: Floats, rounds: float) -> Floats:
        """p*: fewest drafts in total, [m], to take at most ``rounds`` rounds; 0 where none are
        needed, infinite where none suffice."""

    def saved_by_a_round(self, lengths: Floats, rounds: float) -> Floats:
        """-dp*/dN, [m]; 0 where none are needed, undefined where none suffice."""

    def last_gain(self, lengths: Floats, rounds: float) -> Floats:
        """Tokens gained by the last one drafted, [m]; infinite where none are needed."""


@dataclass(frozen=True)
class ExponentialCurves:
    """A(p) = k l (1 - e^{-α p/l}): ``k`` in [0, 1) and ``alpha`` > 0, [m].

    A token drafted is accepted once at most: kα <= 1.
    """

    k: Floats
    alpha: Floats

    def __post_init__(self) -> None:
        assert self.k.shape == self.alpha.shape, (self.k.shape, self.alpha.shape)
        assert ((self.k >= 0) & (self.k < 1) & (self.alpha > 0)).all(), "k or alpha out of range"
        assert (self.k * self.alpha <= 1 + 1e-9).all(), "more tokens accepted than drafted"

    def accepted(self, drafts: Floats, lengths: Floats) -> Floats:
        """Tokens accepted, [m], of ``drafts`` [m] in total."""
        return -self.k * lengths * np.expm1(-self.alpha * drafts / lengths)

    def drafts_needed(self, lengths: Floats, rounds: float) -> Floats:
        """-(l/α) ln(1 - (1 - N/l)/k), [m]."""
        from_drafts = np.maximum(1 - rounds / lengths, 0.0)
        reachable = from_drafts < self.k
        share = np.divide(from_drafts, self.k, out=np.zeros_like(lengths), where=reachable)
        needed = -(lengths / self.alpha) * np.log1p(-share)
        return np.where(reachable | (from_drafts == 0), needed, np.inf)

    def saved_by_a_round(self, lengths: Floats, rounds: float) -> Floats:
        """1 / (α (k - 1 + N/l)), [m]."""
        left = self.last_gain(lengths, rounds)
        return np.divide(1.0, left, out=np.zeros_like(lengths), where=lengths > rounds)

    def last_gain(self, lengths: Floats, rounds: float) -> Floats:
        """α (k - 1 + N/l), [m]: dA/dp = k α e^{-α p/l} at p*."""
        left = self.alpha * (self.k - 1 + rounds / lengths)
        return np.where(lengths > rounds, left, np.inf)


@dataclass(frozen=True)
class RoundCurves:
    """E by points: rounds that draft ever more tokens spend ``spent`` and gain ``gained``.

    Both [m, 1 + d] from 0, not falling; gains by what they cost not rising, and 1 at most.
    """

    spent: Floats
    gained: Floats

    @classmethod
    def from_rates(cls, offered: Floats, survival: Floats) -> RoundCurves:
        """``offered`` [m, d]: probability that the drafter has the j-th token where it may draft
        it; ``survival`` [m, d]: that the first j hold then. Neither rises with j."""
        none = np.zeros((len(offered), 1))
        spent = np.concatenate([none, np.cumsum(offered, axis=1)], axis=1)
        gained = np.concatenate([none, np.cumsum(offered * survival, axis=1)], axis=1)
        return cls(spent, gained)

    def drafts_needed(self, lengths: Floats, rounds: float) -> Floats:
        """N · D(l/N - 1), [m]."""
        return rounds * self._per_round(lengths, rounds)[0]

    def saved_by_a_round(self, lengths: Floats, rounds: float) -> Floats:
        """(l/N) D'(l/N - 1) - D(l/N - 1), [m]."""
        per_round, price = self._per_round(lengths, rounds)
        with np.errstate(invalid="ignore"):  # infinite where none suffice
            return np.where(lengths > rounds, lengths / rounds * price - per_round, 0.0)

    def last_gain(self, lengths: Floats, rounds: float) -> Floats:
        """1 / D'(l/N - 1), [m]."""
        with np.errstate(divide="ignore"):
            gain = 1 / self._per_round(lengths, rounds)[1]
        return np.where(lengths > rounds, gain, np.inf)

    def _per_round(self, lengths: Floats, rounds: float) -> tuple[Floats, Floats]:
        """D and D' at l/N - 1, [m] each: drafts a round, and drafts for one more token gained."""
        needed = np.maximum(lengths / rounds - 1, 0.0)
        end = (self.gained < needed[:, None]).sum(axis=1)
        reachable = end < self.gained.shape[1]
        rows, end = np.arange(len(lengths)), np.clip(end, 1, self.gained.shape[1] - 1)
        gain = self.gained[rows, end] - self.gained[rows, end - 1]
        cost = self.spent[rows, end] - self.spent[rows, end - 1]
        price = np.divide(cost, gain, out=np.full(len(lengths), np.inf), where=gain > 1e-12)
        missing = needed - self.gained[rows, end - 1]
        beyond = np.multiply(missing, price, out=np.zeros_like(missing), where=missing > 0)
        return np.where(reachable, self.spent[rows, end - 1] + beyond, np.inf), price


def fit_curves(drafted: Floats, accepted: Floats, weights: Floats) -> ExponentialCurves:
    """Least squares of accepted = k (1 - e^{-α·drafted}), both per token put out, a row a request.

    All [m, d]; weights >= 0, with some > 0 in each row. For each α of a grid the best k is linear
    least squares, kept below 1 and 1/α; a second grid, between the neighbours of the best α,
    refines it to about 0.4%.
    """
    grid = np.broadcast_to(ALPHA_GRID, (len(drafted), len(ALPHA_GRID)))
    for fineness in ("coarse", "fine"):
        shape = 1 - np.exp(-grid[:, :, None] * drafted[:, None, :])
        weighted = weights[:, None, :] * shape
        squares = np.maximum((weighted * shape).sum(-1), 1e-12)
        k = (weighted * accepted[:, None, :]).sum(-1) / squares
        k = np.clip(k, 0.0, np.minimum(LARGEST_K, 1 / grid))
        error = (weights[:, None, :] * (accepted[:, None, :] - k[:, :, None] * shape) ** 2).sum(-1)
        rows, best = np.arange(len(drafted)), error.argmin(axis=1)
        chosen = ExponentialCurves(k[rows, best], grid[rows, best])
        if fineness == "coarse":
            ratio = ALPHA_GRID[1] / ALPHA_GRID[0]
            grid = chosen.alpha[:, None] * ratio ** np.linspace(-1, 1, 65)
    return chosen
