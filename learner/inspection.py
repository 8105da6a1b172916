"""Comparing the current weights with what engines sampled, without training."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.configs.vocabulary import TrainSample
from paceline.kernels.token_logprobs import row_chunks


def argmax_gaps(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    """How far each target's logit is below the highest: float32 [N], 0 for the most likely token.

    ``hidden`` [N, H], ``weight`` [V, H], ``targets`` int64 [N].
    """
    gaps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for rows in row_chunks(len(hidden), len(weight)):
        logits_NV = (hidden[rows] @ weight.T).float()
        chosen = logits_NV.gather(1, targets[rows, None])[:, 0]
        gaps[rows] = logits_NV.amax(dim=-1) - chosen
    return (gaps,)


def prompt_and_completion(token_ids: NDArray[np.int32], prompt_length: int) -> TrainSample:
    """A sample whose completion is looked at, with nothing to learn from it."""
    zeros = np.zeros(len(token_ids), dtype=np.float32)
    return TrainSample(token_ids, np.arange(len(token_ids)) >= prompt_length, zeros)
