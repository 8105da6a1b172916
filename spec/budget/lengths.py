"""Remaining lengths of requests, from similar requests' lengths and their own so far (pure).

For each key (a problem) the survival function S(t) = P(length > t) is estimated from the lengths
seen, by the product of Kaplan and Meier (1958) over bins:

    S(end of bin) = S(its start) · (1 - ended in the bin / reached the bin)

A length that was cut off (by ``max_tokens``, an abort, or because the request is still running) is
*censored*: it counts as having reached its bin, not as having ended there. Without that, the first
requests of a batch to finish, which are the short ones, would make everything look short.

The pooled lengths of all keys count as a few observations of each key: a key never seen is the
pool. Bins hold one length each up to 16, and eight an octave from there, about 9% wide; within a
bin lengths are taken to be spread evenly. Requests that outlived everything known are expected to
run for as long again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LengthClass = Literal["short", "medium", "long"]

CLASS_QUANTILES = (0.5, 0.9)
"""Quantiles of all lengths: up to the first are short, beyond the second long."""
POOL_WEIGHT = 2.0
"""Number of a key's observations that the pool counts as."""


def _bin_edges(longest: int = 1 << 24) -> Floats:
    """Return the edges of bins: bin b holds lengths in (edges[b], edges[b + 1]]."""
    geometric = np.rint(16 * 2 ** (np.arange(8 * 20 + 1) / 8))
    edges = np.concatenate([np.arange(16), geometric])
    return edges[edges <= longest]


EDGES = _bin_edges()
NUM_BINS = len(EDGES) - 1
CENSORED, ENDED = 0, 1


def _bin(length: int) -> int:
    assert length >= 1, length
    return min(int(np.searchsorted(EDGES, length)) - 1, NUM_BINS - 1)


@dataclass(frozen=True)
class Survival:
    """S(t) = P(length > t): ``survival`` at ``times``, linear in between, falling to 0 at the end.

    Without observations it has one point, and lengths are assumed uniform up to the limit.
    """

    times: Floats
    survival: Floats

    @classmethod
    def from_counts(cls, counts: Floats) -> Survival:
        """Estimate from ``counts`` [2, NUM_BINS], censored and ended, maybe fractions."""
        reached = counts.sum(axis=0)[::-1].cumsum()[::-1]
        num_bins = int(np.count_nonzero(reached > 0))
        hazard = counts[ENDED, :num_bins] / np.maximum(reached[:num_bins], 1e-300)
        survival = np.concatenate([[1.0], np.cumprod(np.clip(1 - hazard, 0.0, 1.0))])
        times = EDGES[: num_bins + 1]
        if num_bins and survival[-1] > 0:  # the longest were cut off: as long again
            times, survival = np.append(times, 2 * times[-1]), np.append(survival, 0.0)
        return cls(times, survival)

    def at(self, time: float) -> float:
        """Return P(length > time)."""
        return float(np.interp(time, self.times, self.survival))

    def expected_remaining(self, so_far: int, max_tokens: int) -> float:
        """Return the mean of min(length, max_tokens) - so_far given length > so_far; at least 1.

        It is the sum of S(t) / S(so_far) over t = so_far … max_tokens - 1.
        """
        most = max(1.0, float(max_tokens - so_far))
        if len(self.times) == 1:
            return max(1.0, most / 2)
        alive = self.at(so_far)
        if alive <= 1e-9:
            return min(max(1.0, float(so_far)), most)
        inner = self.times[(self.times > so_far) & (self.times < max_tokens)]
        times = np.concatenate([[so_far], inner, [max(max_tokens, so_far + 1)]])
        survival = np.interp(times, self.times, self.survival)
        # A line from S(a) to S(b), summed over a … b - 1.
        means = (survival[:-1] + survival[1:]) / 2
        total = means @ np.diff(times) + (survival[:-1] - survival[1:]).sum() / 2
        return min(max(1.0, float(total / alive)), most)

    def quantile(self, probability: float, so_far: int = 0) -> float:
        """Return the quantile of lengths given that they exceed ``so_far``; ``so_far`` itself where
        nothing longer was seen."""
        alive = self.at(so_far)
        falling = self.survival[::-1]
        length = float(np.interp((1 - probability) * alive, falling, self.times[::-1]))
        return max(length, float(so_far))


class LengthHistory:
    """Lengths of finished and cut-off requests by key, to predict those of running ones."""

    def __init__(self) -> None:
        self._pool = np.zeros((2, NUM_BINS))
        self._keys: dict[Hashable, Floats] = {}
        self._running: dict[Hashable, Floats] = {}
        self._running_pool = np.zeros((2, NUM_BINS))
        self._curves: dict[Hashable | None, Survival] = {}

    @property
    def num_keys(self) -> int:
        """Keys with lengths of their own."""
        return len(self._keys)

    def add(self, key: Hashable, length: int, finished: bool) -> None:
        """Add one request of ``length`` >= 1 tokens; not ``finished`` if it was cut off."""
        counts = self._keys.setdefault(key, np.zeros((2, NUM_BINS)))
        for table in (counts, self._pool):
            table[ENDED if finished else CENSORED, _bin(length)] += 1
        self._curves.clear()

    def set_running(self, lengths: Iterable[tuple[Hashable, int]]) -> None:
        """Replace key and length so far of all running requests; they count as censored."""
        self._running = {}
        self._running_pool = np.zeros((2, NUM_BINS))
        for key, length in lengths:
            if length >= 1:
                counts = self._running.setdefault(key, np.zeros((2, NUM_BINS)))
                for table in (counts, self._running_pool):
                    table[CENSORED, _bin(length)] += 1
        self._curves.clear()

    def age(self, factor: float) -> None:
        """Scale all counts by ``factor``, since the weights changed. A key with less than a tenth
        of a request left is forgotten."""
        for counts in (self._pool, *self._keys.values()):
            counts *= factor
        self._keys = {key: counts for key, counts in self._keys.items() if counts.sum() >= 0.1}
        self._curves.clear()

    def survival(self, key: Hashable) -> Survival:
        """Estimate the lengths of this key, the pool counting as ``POOL_WEIGHT`` requests."""
        if key not in self._curves:
            self._curves[key] = Survival.from_counts(self._counts(key))
        return self._curves[key]

    def pooled(self) -> Survival:
        """Estimate the lengths of any key."""
        if None not in self._curves:
            self._curves[None] = Survival.from_counts(self._pool + self._running_pool)
        return self._curves[None]

    def expected_remaining(self, key: Hashable, so_far: int, max_tokens: int) -> float:
        """Return expected tokens to come of a request with ``so_far`` of at most ``max_tokens``."""
        return self.survival(key).expected_remaining(so_far, max_tokens)

    def length_class(self, key: Hashable, so_far: int) -> LengthClass:
        """Return the likeliest class of the whole length, given the length so far (as in DAS).

        Classes are cut at ``CLASS_QUANTILES`` of the pooled lengths.
        """
        pooled = self.pooled()
        cuts = [pooled.quantile(probability) for probability in CLASS_QUANTILES]
        if len(pooled.times) == 1 or so_far >= cuts[1]:
            return "long"
        survival = self.survival(key)
        beyond = [survival.at(max(cut, so_far)) for cut in cuts]
        alive = survival.at(so_far)
        shares: dict[LengthClass, float] = {
            "long": beyond[1],
            "medium": beyond[0] - beyond[1],
            "short": alive - beyond[0],
        }
        return max(shares, key=lambda name: shares[name])

    def _counts(self, key: Hashable) -> Floats:
        pool = self._pool + self._running_pool
        counts = pool * (POOL_WEIGHT / max(pool.sum(), 1.0))
        for table in (self._keys, self._running):
            if key in table:
                counts = counts + table[key]
        return counts
