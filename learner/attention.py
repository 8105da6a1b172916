"""Causal attention over sequences packed into one row, without padding and without a mask.

A microbatch is one row [1, T] of concatenated sequences. Linear layers see it as it is; only
attention must know where sequences end, and learns it from a ``PackedSequences`` that travels
through the model's keyword arguments to every layer. Sequences of equal length lie side by side in
the row, so each run of them is viewed, not copied, as a dense batch [n, heads, length, head_dim];
on a GPU in half precision one variable-length flash-attention call does all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from paceline.configs.errors import ModelError

ATTENTION_NAME = "paceline_packed"


@dataclass(frozen=True)
class PackedSequences:
    """Where the sequences of a packed row lie.

    ``runs`` are (count, length) of neighbouring sequences of equal length, in row order;
    ``boundaries`` int32 [S + 1] are the cumulative lengths; ``max_length`` is the longest.
    """

    runs: tuple[tuple[int, int], ...]
    boundaries: Tensor
    max_length: int

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device) -> PackedSequences:
        """Describe a row of sequences of these lengths; sort them so that runs are few."""
        runs = tuple((len(list(same)), length) for length, same in groupby(lengths))
        boundaries = torch.tensor([0, *lengths]).cumsum(0)
        return cls(runs, boundaries.to(device, torch.int32), max(lengths))

    def positions(self) -> Tensor:
        """Position of every token in its own sequence, int64 [T], on the CPU."""
        return torch.cat([torch.arange(length).repeat(count) for count, length in self.runs])


def register_packed_attention() -> None:
    """Make ``ATTENTION_NAME`` known to transformers, with a mask function that builds no mask."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packed_sequences: PackedSequences,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers layer; no token sees another sequence, dropout is never applied.

    Args:
        query: [1, num_heads, T, head_dim]; key and value: [1, num_kv_heads, T, head_dim].
        packed_sequences: how the T tokens divide into sequences.

    Returns:
        The output [1, T, num_heads, head_dim], and None in place of attention weights.

    Raises:
        ModelError: the model's attention does more than causal softmax.
    """
    assert attention_mask is None
    assert query.shape[0] == 1
    if softcap is not None or s_aux is not None:
        raise ModelError(
            f"{type(module).__name__} caps attention scores or has attention sinks, which packed "
            "attention does not compute; use a model with plain causal attention"
        )
    if sliding_window is not None and packed_sequences.max_length > sliding_window:
        raise ModelError(
            f"a sequence of {packed_sequences.max_length} tokens exceeds the model's sliding "
            f"window of {sliding_window}: lower model.max_length to it"
        )
    # [1, heads, T, head_dim] -> [T, heads, head_dim]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        output = _flash(query, key, value, packed_sequences, scaling)
    else:
        output = _run_by_run(query, key, value, packed_sequences, scaling)
    return output[None], None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scaling: float | None
) -> Tensor:
    output = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        packed.boundaries,
        packed.boundaries,
        packed.max_length,
        packed.max_length,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output


def _run_by_run(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scaling: float | None
) -> Tensor:
    sizes = [count * length for count, length in packed.runs]
    outputs = []
    for (count, length), *pieces in zip(
        packed.runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True
    ):
        # [count * length, heads, head_dim] -> [count, heads, length, head_dim]
        q, k, v = (piece.unflatten(0, (count, length)).transpose(1, 2) for piece in pieces)
        attended = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _no_mask(*_: Any, **__: Any) -> None:
    return None
