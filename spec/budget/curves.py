"""Curves of accepted tokens by drafted tokens, over a whole request (pure).

A request that still has l tokens to go, drafts p tokens over them and has A(p) of them accepted
takes l - A(p) rounds. Budgets need the inverse: the fewest drafts p*(N) with which it takes N
rounds, and what one round more saves, -dp*/dN. p* is convex in N.

``RoundCurves`` has them from E(d), what a round gains by drafting d tokens: N rounds make l tokens
iff each gains l/N - 1, so that

    p*(N) = N · D(l/N - 1),             D the inverse of E

E is concave, linear between its points, which are counted (``acceptance.py``).

DAS (arXiv 2511.13841) gives each request a form with two numbers instead,

    A(p) = k l (1 - e^{-α p/l}),        p*(N) = -(l/α) ln(1 - (1 - N/l)/k)   for l (1-k) < N < l

k the share of the output that drafts can supply at all, kα what the first drafted token is worth.
*The p* printed in the paper is wrong*: it has k (1 - N/l) in the logarithm where (1 - N/l)/k
belongs. From l - k l (1 - e^{-αp/l}) = N follows 1 - e^{-αp/l} = (1 - N/l)/k. As k < 1, k (1 - N/l)
is the smaller number: the printed budgets are too small to finish in the N rounds they were
computed for, and never become infinite at the N that no draft can reach. Where each token of a
draft is accepted with the same probability r, E has no exponential as its A: for r = 0.95 the best
fit needs about twice the true drafts (k = 1, α = 1 against D). Budgets are tested on both forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Curves(Protocol):
    """Drafts that m requests need; ``lengths`` [m] > 0 are the tokens they still have to go."""

    def drafts_needed(self, lengths: Floats, rounds: float) -> Floats:
        """Return p*, the fewest drafts in total, [m], to take at most ``rounds`` rounds; 0 where
        none are needed, infinite where none suffice."""

    def saved_by_a_round(self, lengths: Floats, rounds: float) -> Floats:
        """Return -dp*/dN, [m]; 0 where none are needed, undefined where none suffice."""

    def last_gain(self, lengths: Floats, rounds: float) -> Floats:
        """Return tokens gained by the last one drafted, [m]; infinite where none are needed."""


@dataclass(frozen=True)
class RoundCurves:
    """E by points: rounds that draft ever more tokens spend ``spent`` and gain ``gained``.

    Both are [m, 1 + d], from 0, not falling. Gain per token spent does not rise and is at most 1.
    """

    spent: Floats
    gained: Floats

    def drafts_needed(self, lengths: Floats, rounds: float) -> Floats:
        """Return N · D(l/N - 1), [m]."""
        return rounds * self._per_round(lengths, rounds)[0]

    def saved_by_a_round(self, lengths: Floats, rounds: float) -> Floats:
        """Return (l/N) D'(l/N - 1) - D(l/N - 1), [m]."""
        per_round, price = self._per_round(lengths, rounds)
        with np.errstate(invalid="ignore"):  # infinite where none suffice
            return np.where(lengths > rounds, lengths / rounds * price - per_round, 0.0)

    def last_gain(self, lengths: Floats, rounds: float) -> Floats:
        """Return 1 / D'(l/N - 1), [m]."""
        with np.errstate(divide="ignore"):
            gain = 1 / self._per_round(lengths, rounds)[1]
        return np.where(lengths > rounds, gain, np.inf)

    def _per_round(self, lengths: Floats, rounds: float) -> tuple[Floats, Floats]:
        """Return D and D' at l/N - 1, [m]: drafts a round, and drafts for one more token gained."""
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
