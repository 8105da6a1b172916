"""Comparing the current weights with what engines sampled, without training."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.configs.vocabulary import TrainSample


def prompt_and_completion(token_ids: NDArray[np.int32], prompt_length: int) -> TrainSample:
    """A sample whose completion is looked at, with nothing to learn from it."""
    zeros = np.zeros(len(token_ids), dtype=np.float32)
    return TrainSample(token_ids, np.arange(len(token_ids)) >= prompt_length, zeros)
