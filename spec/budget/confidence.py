"""Acceptance rates of drafted tokens by their match length and estimate, learned online (pure).

Of each token the drafter knows how often it followed before (its estimated probability p̂), and
after how long a match. Both predict acceptance, but neither is its probability: a continuation that
was seen once has p̂ = 1. So tokens are binned into cells by p̂ and by the length of the match before
them (drafted tokens included). Each cell counts verified tokens, those before which all were
accepted, and accepted ones.

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
"""Number of verified tokens in each cell that the prior counts as."""


def _prior() -> Floats:
    """Return the rates before any verification: p̂ in the middle of its cell, less after a short
    match."""
    edges = np.concatenate([[0.0], PROBABILITY_EDGES, [1.0]])
    middle = (edges[:-1] + edges[1:]) / 2
    shortest = np.concatenate([[1], MATCH_EDGES])
    return middle[:, None] * (shortest / (shortest + 1.0))[None, :]


@dataclass
class DraftConfidence:
    """Acceptance rates by cell, [probabilities, matches]; unseen cells have the prior's."""

    _verified: Floats = field(default_factory=lambda: np.zeros_like(_prior()))
    _accepted: Floats = field(default_factory=lambda: np.zeros_like(_prior()))

    def survival(self, drafts: Drafts) -> Floats:
        """Return the probability of a draft's first j tokens to be accepted, [B, K], 0 after."""
        rates = self.rates[self._cells(drafts)]
        inside = np.arange(rates.shape[1]) < drafts.num_tokens[:, None]
        return np.multiply.accumulate(np.where(inside, rates, 0.0), axis=1)

    def observe(
        self, drafts: Drafts, rows: Integers, drafted: Integers, accepted: Integers
    ) -> None:
        """Count ``accepted`` [m] of the first ``drafted`` [m] tokens of drafts in ``rows`` [m]."""
        first, second = self._cells(drafts)
        positions = np.arange(first.shape[1])
        is_verified = positions < np.minimum(drafted, accepted + 1)[:, None]
        is_accepted = positions < accepted[:, None]
        cells = first[rows], second[rows]
        np.add.at(self._verified, (cells[0][is_verified], cells[1][is_verified]), 1.0)
        np.add.at(self._accepted, (cells[0][is_accepted], cells[1][is_accepted]), 1.0)

    def age(self, factor: float) -> None:
        """Scale all counts by ``factor``."""
        self._verified *= factor
        self._accepted *= factor

    @property
    def rates(self) -> Floats:
        """Share of verified tokens that were accepted, by cell."""
        return (self._accepted + PRIOR_STRENGTH * _PRIOR) / (self._verified + PRIOR_STRENGTH)

    def _cells(self, drafts: Drafts) -> tuple[Integers, Integers]:
        match = drafts.matches[:, None] + np.arange(drafts.tokens.shape[1])
        return (
            np.searchsorted(PROBABILITY_EDGES, drafts.probabilities, side="right"),
            np.searchsorted(MATCH_EDGES, match, side="right"),
        )


_PRIOR = _prior()
