"""From drafts a round in fractions to whole ones, keeping the sums (pure)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

STAGGER = (np.sqrt(5) - 1) / 2
"""Requests start at different fractions of a token, so that they do not round up together."""


class DraftRounding:
    """Makes fractions of a token a round whole: 0.3 drafts one token in three rounds of ten.

    What a request's round left over is carried to its next: its drafts add up to its budget, to
    less than a token. Where the drafter had less to offer, or the batch no room, up to
    ``max_draft`` tokens are carried, and spent where there is more. Nothing is random, and nothing
    depends on what the round will sample.
    """

    def __init__(self, max_draft: int) -> None:
        self._max_draft = max_draft
        self._carried: dict[Hashable, float] = {}
        self._num_seen = 0

    def round(
        self,
        requests: Sequence[Hashable],
        per_round: Floats,
        offered: Integers | None = None,
        batch_limit: int | None = None,
    ) -> Integers:
        """Whole drafts [m] of ``requests`` (ids); those not among them are forgotten."""
        due = per_round + np.array([self._carry(request) for request in requests])
        whole = np.minimum(np.floor(due + 1e-9).astype(np.int64), self._max_draft)
        if offered is not None:
            whole = np.minimum(whole, offered)
        if batch_limit is not None:
            whole = within_batch(whole, batch_limit)
        left = np.clip(due - whole, 0.0, self._max_draft)
        self._carried = dict(zip(requests, left.tolist(), strict=True))
        return whole

    def _carry(self, request: Hashable) -> float:
        if request in self._carried:
            return self._carried[request]
        self._num_seen += 1
        return float(self._num_seen * STAGGER % 1)


def within_batch(drafts: Integers, limit: int) -> Integers:
    """``drafts`` [m] without the last tokens of the longest, so that at most ``limit`` are left."""
    if drafts.sum() <= limit:
        return drafts
    positions = np.concatenate([np.arange(count) for count in drafts])
    owners = np.repeat(np.arange(len(drafts)), drafts)
    kept = owners[np.argsort(positions, kind="stable")[:limit]]
    return np.bincount(kept, minlength=len(drafts)).astype(np.int64)
