"""Comparing the current weights with what engines sampled, without training."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.configs.vocabulary import TrainSample


def prompt_and_completion(
    token_ids: NDArray[np.int32],
    prompt_length: int,
    routed_experts: NDArray[np.int16] | None = None,
) -> TrainSample:
    """A sample whose completion is looked at, with nothing to learn from it."""
    zeros = np.zeros(len(token_ids), dtype=np.float32)
    is_completion = np.arange(len(token_ids)) >= prompt_length
    return TrainSample(token_ids, is_completion, zeros, routed_experts=routed_experts)
