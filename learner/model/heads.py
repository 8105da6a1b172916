"""Heads of `PolicyModel.forward`: from hidden states and output embedding to numbers a token.

The output embedding is a plain tensor [V, H], or a DTensor whose rows are divided evenly over
tensor ranks; all of them then see the same hidden states and return the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from paceline.kernels.token_logprobs import row_chunks, token_logprobs
from paceline.kernels.vocab_parallel_logprobs import (
    gather_over_ranks,
    own_targets,
    vocab_parallel_logprobs,
)


def logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return what `token_logprobs` does, also for an embedding that is divided over ranks."""
    if not isinstance(weight, DTensor):
        return token_logprobs(hidden, weight, targets, temperature)
    group = weight.device_mesh.get_group()
    return vocab_parallel_logprobs(hidden, weight.to_local(), targets, group, temperature)


def argmax_gaps(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    """Return how far each target's logit is below the highest: float32 [N], 0 for the argmax.

    ``hidden`` [N, H], ``weight`` [V, H], ``targets`` int64 [N].
    """
    if not isinstance(weight, DTensor):
        chosen, highest = _chosen_and_highest(hidden, weight, targets)
        return (highest - chosen,)
    group = weight.device_mesh.get_group()
    local = weight.to_local()
    targets, is_own = own_targets(targets, len(local), group)
    chosen, highest = _chosen_and_highest(hidden, local, targets)
    chosen = chosen.where(is_own, -torch.inf)
    chosen, highest = gather_over_ranks(torch.stack([chosen, highest]), group).amax(0)
    return (highest - chosen,)


def _chosen_and_highest(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    chosen, highest = (
        torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2)
    )
    for rows in row_chunks(len(hidden), len(weight)):
        logits_NV = (hidden[rows] @ weight.T).float()
        chosen[rows] = logits_NV.gather(1, targets[rows, None])[:, 0]
        highest[rows] = logits_NV.amax(dim=-1)
    return chosen, highest
