"""Log-probability and entropy of chosen tokens, without ever holding all logits.

``log p(y_t) = z_t[y_t] - logsumexp(z_t)`` and ``H_t = logsumexp(z_t) - sum_v p_t[v] z_t[v]`` with
``z_t = (W h_t) / temperature``. Both are differentiable: ``d log p(y) / d z_v = [v = y] - p_v`` and
``d H / d z_v = -p_v (log p_v + H)``. Rows are worked on in chunks, and the backward pass computes
each chunk's logits again. So at most one chunk of [rows, V] logits exists at a time, and one of
probabilities where a loss uses the entropy. The projection runs in the precision of its inputs (as
an engine's does); softmax and sums are float32.

Shapes: T positions, V vocabulary entries, H hidden size.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 2**22
"""Elements of a chunk of logits: 16 MiB in float32."""

MIN_ROWS_PER_CHUNK = 512
"""Least rows of a chunk: fewer starve the matrix units, even where the bound above asks for it."""


class RowStatistics(NamedTuple):
    """Numbers of every row of logits, float32 [T] each, in nats."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of ``targets`` and entropies of their distributions, chunked over T.

    Args:
        hidden: final hidden states [T, H], float32 or bfloat16; T may be 0.
        weight: output embedding [V, H], of the same dtype.
        targets: chosen tokens, int64 [T].
        temperature: logits are divided by it; positive.

    Returns:
        ``(logprobs, entropy)`` in nats, float32 [T], both differentiable. A loss that leaves one of
        them out pays nothing for it.
    """
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, temperature)
    return logprobs, entropy


def token_logprobs_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the same by plain autograd over all logits [T, V]; the op is tested against it."""
    logits_TV = (hidden @ weight.T).float() / temperature
    all_logprobs_TV = logits_TV.log_softmax(dim=-1)
    entropy = -(all_logprobs_TV.exp() * all_logprobs_TV).sum(dim=-1)
    return all_logprobs_TV.gather(1, targets[:, None])[:, 0], entropy


def row_statistics(logits_TV: Tensor, targets: Tensor, temperature: float) -> RowStatistics:
    """Return statistics of rows of logits: by the Triton kernel on a GPU, else eagerly."""
    if logits_TV.is_cuda and HAS_TRITON:
        return row_statistics_triton(logits_TV, targets, temperature)
    return row_statistics_eager(logits_TV, targets, temperature)


def row_statistics_eager(logits_TV: Tensor, targets: Tensor, temperature: float) -> RowStatistics:
    """Return what the Triton kernel computes, by torch operations on any device."""
    scaled_TV = logits_TV.float() / temperature
    logsumexp = scaled_TV.logsumexp(dim=-1)
    all_logprobs_TV = scaled_TV.sub_(logsumexp[:, None])
    chosen = all_logprobs_TV.gather(1, targets[:, None])[:, 0]
    entropy = -all_logprobs_TV.exp().mul_(all_logprobs_TV).sum(dim=-1)
    return RowStatistics(chosen, entropy, logsumexp)


def row_chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Yield consecutive slices, bounded in size, that cover ``num_rows`` rows of logits."""
    step = max(MIN_ROWS_PER_CHUNK, LOGITS_PER_CHUNK // vocab_size)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        # three tensors, not views of one: FSDP warns of views in what a module returns
        logprobs, entropy, logsumexp = (
            torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(3)
        )
        for rows in row_chunks(len(hidden), len(weight)):
            statistics = row_statistics(hidden[rows] @ weight.T, targets[rows], temperature)
            logprobs[rows], entropy[rows], logsumexp[rows] = statistics
        ctx.save_for_backward(hidden, weight, targets, entropy, logsumexp)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # None says that a loss left the output out
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None
        hidden, weight, targets, entropy, logsumexp = ctx.saved_tensors
        grad_hidden, grad_weight = input_gradients(
            (hidden, weight, targets),
            (entropy, logsumexp),
            (grad_logprobs, grad_entropy),
            ctx.temperature,
        )
        return grad_hidden, grad_weight, None, None


def input_gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    statistics: tuple[Tensor, Tensor],
    gradients: tuple[Tensor | None, Tensor | None],
    temperature: float,
    is_own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden states [T, H] and output embedding [V, H], chunk by chunk.

    Args:
        inputs: hidden states [T, H], embedding [V, H] and targets [T].
        statistics: entropy and logsumexp [T] of whole rows of logits, of which V may be a share.
        gradients: those of log-probabilities and entropies [T]; None for what a loss left out.
        temperature: as in the forward pass.
        is_own: bool [T], False where the target is none of these V.
    """
    (hidden, weight, targets), (entropy, logsumexp) = inputs, statistics
    scale, entropy_scale = (None if g is None else g.float() / temperature for g in gradients)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for rows in row_chunks(len(hidden), len(weight)):
        all_logprobs_TV = (hidden[rows] @ weight.T).float() / temperature
        all_logprobs_TV -= logsumexp[rows, None]
        grad_logits_TV = logits_gradient(
            all_logprobs_TV,
            targets[rows],
            entropy[rows],
            None if scale is None else scale[rows],
            None if entropy_scale is None else entropy_scale[rows],
            None if is_own is None else is_own[rows],
        ).to(weight.dtype)
        grad_hidden[rows] = grad_logits_TV @ weight
        grad_weight += grad_logits_TV.T @ hidden[rows]
    return grad_hidden, grad_weight.to(weight.dtype)


def logits_gradient(
    all_logprobs_TV: Tensor,
    targets: Tensor,
    entropy: Tensor,
    scale: Tensor | None,
    entropy_scale: Tensor | None,
    is_own: Tensor | None = None,
) -> Tensor:
    """Return ``scale_t d log p(y_t) / d z_t + entropy_scale_t d H_t / d z_t``, float32 [T, V].

    A scale [T] of None leaves its term out. Where ``is_own``, bool [T], is False, the target is
    none of these V. ``all_logprobs_TV`` is overwritten.
    """
    if entropy_scale is None:
        assert scale is not None
        grad_TV = all_logprobs_TV.exp_().mul_(-scale[:, None])
    else:
        # -p (s + e (log p + H)): both terms share the factor p
        probabilities_TV = all_logprobs_TV.exp()
        grad_TV = all_logprobs_TV.add_(entropy[:, None]).mul_(-entropy_scale[:, None])
        grad_TV.mul_(probabilities_TV)
        if scale is not None:
            grad_TV.addcmul_(probabilities_TV, -scale[:, None].expand_as(probabilities_TV))
    if scale is not None:
        chosen = scale if is_own is None else scale.where(is_own, 0.0)
        grad_TV.scatter_add_(1, targets[:, None], chosen[:, None])
    return grad_TV


# Triton comes with CUDA builds of torch and is absent from CPU ones.
HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def row_statistics_kernel(
        logits_ptr: tl.tensor,
        targets_ptr: tl.tensor,
        logprobs_ptr: tl.tensor,
        entropy_ptr: tl.tensor,
        logsumexp_ptr: tl.tensor,
        row_stride: int,
        vocab_size: int,
        inverse_temperature: float,
        BLOCK: tl.constexpr,
    ) -> None:
        """Reduce one row a program by an online softmax, with the sum of p times logit besides.

        Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3.
        """
        row = tl.program_id(0).to(tl.int64)
        row_ptr = logits_ptr + row * row_stride
        maximum = -3e38  # finite: -inf times a total of 0 would be nan below
        total = 0.0
        weighted = 0.0  # sum of exp(z - maximum) * (z - maximum)
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocab_size
            logits = tl.load(row_ptr + columns, mask=inside, other=-3e38)
            logits = logits.to(tl.float32) * inverse_temperature
            new_maximum = tl.maximum(maximum, tl.max(logits, axis=0))
            rescale = tl.exp(maximum - new_maximum)
            shifted = tl.where(inside, logits - new_maximum, 0.0)
            exponentials = tl.where(inside, tl.exp(shifted), 0.0)
            weighted = (weighted + total * (maximum - new_maximum)) * rescale
            weighted += tl.sum(exponentials * shifted, axis=0)
            total = total * rescale + tl.sum(exponentials, axis=0)
            maximum = new_maximum
        log_total = tl.log(total)
        logsumexp = maximum + log_total
        target = tl.load(targets_ptr + row)
        chosen = tl.load(row_ptr + target).to(tl.float32) * inverse_temperature
        tl.store(logprobs_ptr + row, chosen - logsumexp)
        tl.store(entropy_ptr + row, log_total - weighted / total)
        tl.store(logsumexp_ptr + row, logsumexp)

    def row_statistics_triton(
        logits_TV: Tensor, targets: Tensor, temperature: float
    ) -> RowStatistics:
        """Return statistics of contiguous rows, float32 or bfloat16, by one pass over them."""
        num_rows, vocab_size = logits_TV.shape
        assert logits_TV.stride(1) == 1, "rows of logits must be contiguous"
        output = torch.empty(3, num_rows, dtype=torch.float32, device=logits_TV.device)
        if num_rows:
            block = min(8192, 2 ** math.ceil(math.log2(max(vocab_size, 2))))
            row_statistics_kernel[(num_rows,)](
                logits_TV,
                targets,
                *output.unbind(),
                logits_TV.stride(0),
                vocab_size,
                1.0 / temperature,
                BLOCK=block,
                num_warps=min(8, max(1, block // 256)),
            )
        return RowStatistics(*output.unbind())
