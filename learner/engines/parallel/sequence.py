"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv 2309.14509): a row's tokens divided.

Outside attention each of R ranks works on its T / R neighbouring tokens of a row. Inside, each has
all T tokens of its share of the heads: an all-to-all before and one after attention trade tokens
for heads, so that attention itself is that of one rank, packed segments, shared prompts and all.

The outputs for the trained tokens are brought together: every rank computes the same loss, which
may couple tokens, and differentiates it by its own. Each rank's gradients of the parameters are
then its tokens' part of one sum, as data ranks' are of theirs, and FSDP reduces over both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedConfig

from paceline.configs.errors import ModelError
from paceline.configs.limits.parallel_limits import undivided_by_sequence
from paceline.learner.engines.mesh import RankMesh


class SequenceRanks:
    """The R ranks of ``group``, each with its share of every row, in order."""

    # no dataclass: of those among a module's arguments FSDP hands on a copy

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._num_ranks = dist.get_world_size(group)

    def share(self, row: Tensor) -> Tensor:
        """Return this rank's [1, T / R] of a value of every token, [1, T]."""
        return row.chunk(self._num_ranks, dim=1)[self._rank]

    def own_places(self, places: Tensor, num_own: int) -> tuple[Tensor, Tensor]:
        """Return which of ``places`` in the row, int64 [N], are among this rank's ``num_own``
        tokens: their indices, int64 [n], and their places in its share, int64 [n]."""
        shifted = places - self._rank * num_own
        which = ((shifted >= 0) & (shifted < num_own)).nonzero()[:, 0]
        return which, shifted[which]

    def bring_together(self, own: Tensor, which: Tensor, num_all: int) -> Tensor:
        """Gather every rank's values, [``num_all``], of which ``own`` [n] are at indices ``which``.

        A gradient goes back to its own rank only.
        """
        together = _Together.apply(own, which, num_all, self._group)
        assert isinstance(together, Tensor)
        return together

    def tokens_to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Turn [T / R, heads, head_dim] into [T, heads / R, head_dim] for each, in one exchange.

        Key-value heads that R does not divide are repeated: several ranks' queries share them.
        """
        num_repeats = self._num_ranks // math.gcd(key.shape[1], self._num_ranks)
        if num_repeats > 1:
            key, value = (heads.repeat_interleave(num_repeats, dim=1) for heads in (key, value))
        by_rank = [heads.unflatten(1, (self._num_ranks, -1)) for heads in (query, key, value)]
        received = self._exchange(torch.cat(by_rank, dim=2).transpose(0, 1))
        return received.flatten(0, 1).split([heads.shape[2] for heads in by_rank], dim=1)

    def heads_to_tokens(self, output: Tensor) -> Tensor:
        """Turn [T, heads / R, head_dim] into [T / R, heads, head_dim]."""
        received = self._exchange(output.unflatten(0, (self._num_ranks, -1)))
        return received.transpose(0, 1).flatten(1, 2)

    def _exchange(self, pieces: Tensor) -> Tensor:
        """Send piece r of [R, ...] to rank r; what comes from rank r lies at r."""
        received = _Exchange.apply(pieces, self._group)
        assert isinstance(received, Tensor)
        return received


def sequence_ranks(config: PreTrainedConfig, mesh: RankMesh) -> SequenceRanks | None:
    """Return the ranks that divide this rank's rows; None where it works on whole ones.

    Raises:
        ModelError: they do not divide the model's attention heads.
    """
    num_ranks, num_tensor_ranks = mesh.sizes["sequence"], mesh.sizes["tensor"]
    if num_ranks == 1:
        return None
    problem = undivided_by_sequence(num_ranks, num_tensor_ranks, config.num_attention_heads)
    if problem is not None:
        raise ModelError(problem)
    assert mesh.devices is not None, "sequence ranks need a process group"
    return SequenceRanks(mesh.devices.get_group("sequence"))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pieces: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(pieces, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.group), None


def _exchange(pieces: Tensor, group: ProcessGroup) -> Tensor:
    pieces = pieces.contiguous()
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces, group=group)
    return received


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, which: Tensor, num_all: int, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(which)
        ctx.set_materialize_grads(False)  # None says that a loss left the output out
        together = own.new_zeros(num_all).index_copy_(0, which, own)
        if num_all:
            dist.all_reduce(together, group=group)
        return together

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (which,) = ctx.saved_tensors
        return None if grad is None else grad.index_select(0, which), None, None, None
