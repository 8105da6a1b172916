"""Log-probability and entropy of chosen tokens, with the vocabulary divided over ranks.

Rank r of R holds rows ``r V / R`` to ``(r + 1) V / R`` of the output embedding and sees its own
share of the logits only. With ``L_r`` the logsumexp and ``H_r`` the entropy over that share,
``L = logsumexp_r L_r`` and ``s_r = exp(L_r - L)`` the probability that falls to rank r:
``log p(y) = log p_r(y) + log s_r`` for the rank that holds y, and
``H = sum_r s_r (H_r - log s_r)``, the chain rule of entropy. So the ranks exchange three numbers a
position, once, and no logits. As in `token_logprobs`, rows are worked on in chunks and logits are
recomputed in the backward pass.

Shapes: T positions, V vocabulary entries, H hidden size, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from paceline.kernels.token_logprobs import (
    RowStatistics,
    input_gradients,
    row_chunks,
    row_statistics,
)


def vocab_parallel_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, group: ProcessGroup, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of ``targets`` and entropies of their distributions on every rank.

    Every rank of ``group`` calls it, with the same ``hidden``, ``targets`` and gradients of the
    outputs.

    Args:
        hidden: final hidden states [T, H], float32 or bfloat16; T may be 0.
        weight: this rank's rows of the output embedding [V / R, H], of the same dtype.
        targets: chosen tokens, int64 [T], in the whole vocabulary.
        group: the ranks that hold the other rows.
        temperature: logits are divided by it; positive.

    Returns:
        ``(logprobs, entropy)`` in nats, float32 [T], both differentiable, each rank's weight by its
        own rows. A loss that leaves one of them out pays nothing for it.
    """
    logprobs, entropy = _VocabParallelLogprobs.apply(hidden, weight, targets, group, temperature)
    return logprobs, entropy


def own_targets(targets: Tensor, num_rows: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return targets [T] as places in this rank's ``num_rows`` rows of the vocabulary.

    Beside them bool [T]: False where this rank does not hold the target, whose place is then 0.
    """
    local = targets - dist.get_rank(group) * num_rows
    is_own = (local >= 0) & (local < num_rows)
    return torch.where(is_own, local, 0), is_own


def gather_over_ranks(values: Tensor, group: ProcessGroup) -> Tensor:
    """Return every rank's ``values`` [...], as [R, ...]."""
    values = values.contiguous()
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    if values.numel():
        dist.all_gather(gathered, values, group=group)
    return torch.stack(gathered)


def statistics_over_ranks(own: RowStatistics, is_own: Tensor, group: ProcessGroup) -> RowStatistics:
    """Return statistics of whole rows from those of every rank's share of each.

    ``own.logprobs`` count where ``is_own``.
    """
    chosen = own.logprobs.where(is_own, -torch.inf)
    of_ranks = gather_over_ranks(torch.stack([chosen, own.entropy, own.logsumexp]), group)
    logprobs_RT, entropy_RT, logsumexp_RT = of_ranks.unbind(1)
    logsumexp = logsumexp_RT.logsumexp(0)
    log_shares_RT = logsumexp_RT - logsumexp
    entropy = (log_shares_RT.exp() * (entropy_RT - log_shares_RT)).sum(0)
    return RowStatistics((logprobs_RT + log_shares_RT).amax(0), entropy, logsumexp)


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: ProcessGroup,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        targets, is_own = own_targets(targets, len(weight), group)
        own = torch.empty(3, len(hidden), dtype=torch.float32, device=hidden.device)
        for rows in row_chunks(len(hidden), len(weight)):
            statistics = row_statistics(hidden[rows] @ weight.T, targets[rows], temperature)
            own[:, rows] = torch.stack(statistics)
        whole = statistics_over_ranks(RowStatistics(*own.unbind()), is_own, group)
        ctx.save_for_backward(hidden, weight, targets, is_own, whole.entropy, whole.logsumexp)
        ctx.group = group
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # None says that a loss left the output out
        return whole.logprobs, whole.entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None
        hidden, weight, targets, is_own, entropy, logsumexp = ctx.saved_tensors
        grad_hidden, grad_weight = input_gradients(
            (hidden, weight, targets),
            (entropy, logsumexp),
            (grad_logprobs, grad_entropy),
            ctx.temperature,
            is_own,
        )
        if grad_hidden.numel():
            # the gradient of hidden states is the sum over all ranks' shares of the vocabulary
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden, grad_weight, None, None, None
