"""Metrics of one step, gathered over microbatches and ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paceline.learner.engines.mesh import RankMesh


class StepMetrics:
    """Sums and maxima of a step; nothing is read from the device before ``reduced``."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor] | None = None) -> None:
        """Add what a loss reported of a microbatch: sums over its tokens, and maxima."""
        for name, value in sums.items():
            # double: a float32 sum would depend on the order of microbatches in its last digits
            previous = self._sums.get(name, 0.0)
            self._sums[name] = previous + value.detach().double()
        for name, value in (maxima or {}).items():
            previous = self._maxima.get(name, value)
            self._maxima[name] = torch.maximum(previous, value.detach())

    def reduced(self, num_tokens: int, mesh: RankMesh) -> dict[str, float]:
        """Return means over ``num_tokens`` and maxima, over all ranks; the same on every rank.

        The loss is a sum: its tokens carry their weights.
        """
        # objects, not tensors: a rank whose microbatches were all empty knows no metric's name
        gathered = mesh.gather((_to_floats(self._sums), _to_floats(self._maxima)))
        means: dict[str, float] = {}
        maxima: dict[str, float] = {}
        for sums_of_rank, maxima_of_rank in gathered:
            for name, value in sums_of_rank.items():
                share = value if name == "loss" else value / num_tokens
                means[name] = means.get(name, 0.0) + share
            for name, value in maxima_of_rank.items():
                maxima[name] = max(maxima.get(name, value), value)
        return means | maxima


def _to_floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}
