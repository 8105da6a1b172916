"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Return half the squared error of each token's value, [T], or the clipped value's if larger.

    ``max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2`` as in the code of Schulman et
    al. 2017 (arXiv 1707.06347); without ``clip`` it is plain regression.
    """
    squares = (values - returns).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        squares = torch.maximum(squares, (clipped - returns).square())
    return squares / 2
