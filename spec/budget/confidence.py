"""How likely drafted tokens are to hold, by what the drafter knows of each, learned online (pure).

A drafter sees more than averages: how often what it drafts followed before (its estimated
probability p̂), and after how long a match. Both say much, neither is a probability that the token
is sampled: a continuation that was seen once has p̂ = 1. So tokens are put into cells by p̂ and by
the length of the match before them (the tokens drafted before included), and in each cell it is
counted how many were verified, which a token is if all before it held, and how many held.

Counts of earlier rounds decide how much is drafted, never what is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paceline.spec.history import Drafts

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PROBABILITY_EDGES = np.array([0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.999])
MATCH_EDGES = np.array([2, 3, 5, 9, 17, 32])
PRIOR_STRENGTH = 4.0
"""Verified tokens that the prior counts as in each cell."""


def _prior() -> Floats:
    """Assumed rates before anything was verified: p̂ in the middle of its cell, less after a short
    match."""
    edges = np.concatenate([[0.0], PROBABILITY_EDGES, [1.0]])
    middle = (edges[:-1] + edges[1:]) / 2
    shortest = np.concatenate([[1], MATCH_EDGES])
    return middle[:, None] * (shortest / (shortest + 1.0))[None, :]


@dataclass
class DraftConfidence:
    """Rates by cell, [probabilities, matches]; cells never seen are the prior."""

    _verified: Floats = field(default_factory=lambda: np.zeros_like(_prior()))
    _held: Floats = field(default_factory=lambda: np.zeros_like(_prior()))

    def survival(self, drafts: Drafts) -> Floats:
        """Probability that a draft's first j tokens hold, [B, K]; 0 beyond its end."""
        rates = self.rates[self._cells(drafts)]
        inside = np.arange(rates.shape[1]) < drafts.num_tokens[:, None]
        return np.multiply.accumulate(np.where(inside, rates, 0.0), axis=1)

    def observe(
        self, drafts: Drafts, rows: Integers, drafted: Integers, accepted: Integers
    ) -> None:
        """Take in what came of the first ``drafted`` [m] tokens of the drafts in ``rows`` [m]."""
        first, second = self._cells(drafts)
        positions = np.arange(first.shape[1])
        reached = positions < np.minimum(drafted, accepted + 1)[:, None]
        held = positions < accepted[:, None]
        cells = first[rows], second[rows]
        np.add.at(self._verified, (cells[0][reached], cells[1][reached]), 1.0)
        np.add.at(self._held, (cells[0][held], cells[1][held]), 1.0)

    def age(self, factor: float) -> None:
        """Let what was seen count ``factor`` as much."""
        self._verified *= factor
        self._held *= factor

    @property
    def rates(self) -> Floats:
        """Share of verified tokens that held, by cell."""
        return (self._held + PRIOR_STRENGTH * _PRIOR) / (self._verified + PRIOR_STRENGTH)

    def _cells(self, drafts: Drafts) -> tuple[Integers, Integers]:
        match = drafts.matches[:, None] + np.arange(drafts.tokens.shape[1])
        return (
            np.searchsorted(PROBABILITY_EDGES, drafts.probabilities, side="right"),
            np.searchsorted(MATCH_EDGES, match, side="right"),
        )


_PRIOR = _prior()
