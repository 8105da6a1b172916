"""Causal attention over sequences packed into one row, without padding and without a mask.

A microbatch is one row [1, T] of segments. A segment is a sequence of its own, or it continues
another segment, its prefix, which several may share: the completions of one prompt. Linear layers
see the row as it is; only attention must know what belongs together, and learns it from a
``PackedSegments`` that travels through the model's keyword arguments to every layer.

On a GPU in half precision one variable-length flash-attention call does the whole row. Elsewhere
segments of equal shape, side by side in the row, are attended to as dense batches
[n, heads, length, head_dim]; prefixes are then gathered for every segment that continues them, so
sharing saves the work of all other layers but not of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from paceline.configs.errors import ModelError

ATTENTION_NAME = "paceline_packed"


class Segment(NamedTuple):
    """``length`` tokens at ``start`` of the row, continuing the ``prefix`` tokens at
    ``prefix_start`` (0 tokens: a sequence of its own)."""

    start: int
    length: int
    prefix_start: int = 0
    prefix: int = 0


class Run(NamedTuple):
    """``num_segments`` neighbours of equal ``prefix`` and ``length``."""

    num_segments: int
    prefix: int
    length: int


@dataclass(frozen=True)
class PackedSegments:
    """How a row's T tokens divide into segments.

    ``runs`` in row order. ``keys`` int64 [K] are the places in the row of every segment's keys, its
    prefix before itself; None where nothing is shared, because then they are the row.
    ``query_boundaries`` and ``key_boundaries`` int32 [S + 1] are cumulative lengths over the row
    and over ``keys``.
    """

    runs: tuple[Run, ...]
    keys: Tensor | None
    query_boundaries: Tensor
    key_boundaries: Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def from_segments(cls, segments: Sequence[Segment], device: torch.device) -> PackedSegments:
        """Describe a row; segments tile it in order, sorted so that runs are few."""
        shapes = [(segment.prefix, segment.length) for segment in segments]
        runs = tuple(Run(len(list(same)), *shape) for shape, same in groupby(shapes))
        lengths = [segment.length for segment in segments]
        key_lengths = [segment.prefix + segment.length for segment in segments]
        return cls(
            runs,
            _key_places(segments, runs).to(device) if any(s.prefix for s in segments) else None,
            torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
            torch.tensor([0, *key_lengths]).cumsum(0).to(device, torch.int32),
            max(lengths),
            max(key_lengths),
        )

    def positions(self) -> Tensor:
        """Position of every token in its sequence, prefix counted, int64 [T], on the CPU."""
        return torch.cat(
            [torch.arange(prefix, prefix + n).repeat(count) for count, prefix, n in self.runs]
        )


def _key_places(segments: Sequence[Segment], runs: Sequence[Run]) -> Tensor:
    """Run by run: [count, prefix + length] places, flattened."""
    starts, _, prefix_starts, _ = np.array(segments).T
    places = []
    done = 0
    for count, prefix, length in runs:
        of_run = slice(done, done + count)
        before = prefix_starts[of_run, None] + np.arange(prefix)
        own = starts[of_run, None] + np.arange(length)
        places.append(np.concatenate([before, own], axis=1).ravel())
        done += count
    return torch.from_numpy(np.concatenate(places))


def register_packed_attention() -> None:
    """Make ``ATTENTION_NAME`` known to transformers, with a mask function that builds no mask."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packed_segments: PackedSegments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers layer: a token sees its prefix and what precedes it in its
    segment, nothing else. Dropout is never applied.

    Args:
        query: [1, num_heads, T, head_dim]; key and value: [1, num_kv_heads, T, head_dim].
        packed_segments: how the T tokens divide.

    Returns:
        The output [1, T, num_heads, head_dim], and None in place of attention weights.

    Raises:
        ModelError: the model's attention does more than causal softmax.
    """
    assert attention_mask is None
    if softcap is not None or s_aux is not None:
        raise ModelError(
            f"{type(module).__name__} caps attention scores or has attention sinks, which packed "
            "attention does not compute; use a model with plain causal attention"
        )
    if sliding_window is not None and packed_segments.max_keys > sliding_window:
        raise ModelError(
            f"a sequence of {packed_segments.max_keys} tokens exceeds the model's sliding "
            f"window of {sliding_window}: lower model.max_length to it"
        )
    # [1, heads, T, head_dim] -> [T, heads, head_dim]
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    takes_flash = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    attend = flash_attention if takes_flash else run_by_run_attention
    return attend(query, key, value, packed_segments, scaling)[None], None


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, scaling: float | None
) -> Tensor:
    """One variable-length call: query [T, num_heads, head_dim], key and value [T, num_kv_heads,
    head_dim], in half precision on a GPU; the output is shaped like the query."""
    if packed.keys is not None:
        key, value = key.index_select(0, packed.keys), value.index_select(0, packed.keys)
    # flash attention aligns the causal mask to the last query and the last key of a segment
    output = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        packed.query_boundaries,
        packed.key_boundaries,
        packed.max_queries,
        packed.max_keys,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output


def run_by_run_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, scaling: float | None
) -> Tensor:
    """The same on any device, in any precision: a dense causal batch for every run."""
    if packed.keys is not None:
        query, key, value = (t.index_select(0, packed.keys) for t in (query, key, value))
    sizes = [count * (prefix + length) for count, prefix, length in packed.runs]
    outputs = []
    for (count, prefix, length), *pieces in zip(
        packed.runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True
    ):
        # [count * keys, heads, head_dim] -> [count, heads, keys, head_dim]
        shape = (count, prefix + length)
        q, k, v = (piece.unflatten(0, shape).transpose(1, 2) for piece in pieces)
        attended = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        # the prefix attended once more for every segment; its own segment has that result
        outputs.append(attended[:, :, prefix:].transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)
