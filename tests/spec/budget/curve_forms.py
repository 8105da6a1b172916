"""Curves for tests: DAS's exponential, which has a closed form, and rounds by their rates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.spec.budget.curves import Floats, RoundCurves


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


def round_curves(offered: Floats, survival: Floats) -> RoundCurves:
    """``offered`` [m, d]: probability that the drafter has the j-th token where it may draft it;
    ``survival`` [m, d]: that the first j hold then. Neither rises with j."""
    none = np.zeros((len(offered), 1))
    spent = np.concatenate([none, np.cumsum(offered, axis=1)], axis=1)
    gained = np.concatenate([none, np.cumsum(offered * survival, axis=1)], axis=1)
    return RoundCurves(spent, gained)
