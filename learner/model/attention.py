"""Causal attention over sequences packed into one row, without padding and without a mask.

A microbatch is one row [1, T] of segments. A segment is a sequence of its own, or it continues
another segment, its prefix, which several may share: the completions of one prompt. Linear layers
see the row as it is. Attention alone depends on what belongs together: a ``PackedSegments`` in the
model's keyword arguments says it to every layer.

A row may also be processed in chunks of its tokens (`chunks_of`). A chunk's queries attend to keys
of earlier chunks too, which a ``RowKeys`` holds.

On a GPU in half precision one variable-length flash-attention call does the whole row. Elsewhere
segments of equal shape, side by side in the row, are attended to as dense batches
[n, heads, length, head_dim], for each of which its keys are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from paceline.configs.errors import ModelError
from paceline.learner.engines.parallel.sequence import SequenceRanks

ATTENTION_NAME = "paceline_packed"


class RowKeys(Protocol):
    """Keys and values of a row that is processed in chunks."""

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next chunk, [chunk, num_kv_heads, head_dim], and return all so far,
        [tokens up to its last one, num_kv_heads, head_dim]."""


class Segment(NamedTuple):
    """``length`` tokens at ``start`` of the row, continuing the ``prefix`` tokens at
    ``prefix_start``; a sequence of its own has 0 of those."""

    start: int
    length: int
    prefix_start: int = 0
    prefix: int = 0


class SegmentSlice(NamedTuple):
    """``length`` tokens of a segment after its first ``skipped``."""

    segment: Segment
    skipped: int
    length: int


class Run(NamedTuple):
    """``num_segments`` neighbours of equal shape: ``length`` queries, which attend to ``prefix``
    keys and to their own."""

    num_segments: int
    prefix: int
    length: int


@dataclass(frozen=True)
class PackedSegments:
    """Segments of a row of T tokens, or of a chunk of it: queries and the keys they attend to.

    ``runs`` are in row order. ``keys`` int64 [K] are the places in the row of every segment's keys,
    its prefix first. They are None where no prefix is shared: then the keys are the last
    ``num_keys`` up to the last query. ``query_boundaries`` and ``key_boundaries`` int32 [S + 1]
    are cumulative lengths over the queries and over the keys.
    """

    segments: tuple[Segment, ...]
    runs: tuple[Run, ...]
    keys: Tensor | None
    query_boundaries: Tensor
    key_boundaries: Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def from_segments(cls, segments: Sequence[Segment], device: torch.device) -> PackedSegments:
        """Describe a row, which segments tile in order, sorted so that runs are few."""
        return cls.from_pieces([SegmentSlice(s, 0, s.length) for s in segments], device)

    @classmethod
    def from_pieces(cls, pieces: Sequence[SegmentSlice], device: torch.device) -> PackedSegments:
        """Describe neighbouring pieces of a row."""
        before = [piece.segment.prefix + piece.skipped for piece in pieces]
        lengths = [piece.length for piece in pieces]
        key_lengths = [prefix + length for prefix, length in zip(before, lengths, strict=True)]
        shapes = groupby(zip(before, lengths, strict=True))
        is_shared = any(piece.segment.prefix for piece in pieces)
        return cls(
            tuple(piece.segment for piece in pieces),
            tuple(Run(len(list(same)), *shape) for shape, same in shapes),
            _key_places(pieces).to(device) if is_shared else None,
            torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
            torch.tensor([0, *key_lengths]).cumsum(0).to(device, torch.int32),
            max(lengths),
            max(key_lengths),
        )

    @property
    def num_keys(self) -> int:
        """Number of keys that are read, a shared prefix once for each segment that continues it."""
        return sum(count * (prefix + length) for count, prefix, length in self.runs)

    def positions(self) -> Tensor:
        """Return the position of every token in its sequence, prefix counted; int64 [T], CPU."""
        return torch.cat(
            [torch.arange(prefix, prefix + n).repeat(count) for count, prefix, n in self.runs]
        )

    def keys_among(self, row: Tensor) -> Tensor:
        """Select the keys (or values) that are read, [num_keys, heads, head_dim], from all up to
        the last query's, [tokens, heads, head_dim]."""
        if self.keys is None:
            return row[len(row) - self.num_keys :]
        return row.index_select(0, self.keys)


def _key_places(pieces: Sequence[SegmentSlice]) -> Tensor:
    places = []
    for (start, _, prefix_start, prefix), skipped, length in pieces:
        places += [
            range(prefix_start, prefix_start + prefix),
            range(start, start + skipped + length),
        ]
    return torch.from_numpy(np.concatenate([np.asarray(some, dtype=np.int64) for some in places]))


@lru_cache(maxsize=16)
def chunks_of(
    segments: tuple[Segment, ...], num_tokens: int, device: torch.device
) -> tuple[PackedSegments, ...]:
    """Return a row's chunks of ``num_tokens`` tokens, the last of what is left; for all layers."""
    last = segments[-1]
    chunks = []
    for start in range(0, last.start + last.length, num_tokens):
        pieces = list(_pieces(segments, start, start + num_tokens))
        chunks.append(PackedSegments.from_pieces(pieces, device))
    return tuple(chunks)


def _pieces(segments: Sequence[Segment], start: int, stop: int) -> Iterator[SegmentSlice]:
    for segment in segments:
        first = max(start, segment.start)
        length = min(stop, segment.start + segment.length) - first
        if length > 0:
            yield SegmentSlice(segment, first - segment.start, length)


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
    packed_segments: PackedSegments | None,
    row_keys: RowKeys | None = None,
    sequence_ranks: SequenceRanks | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute a transformers layer's attention: of a token to its prefix, to what precedes it in
    its segment and to itself. Dropout is never applied.

    Args:
        query: [1, num_heads, T, head_dim]; key and value: [1, num_kv_heads, T, head_dim].
        packed_segments: how the T tokens divide; None where only ``row_keys`` are wanted.
        row_keys: keys and values of earlier chunks, where the T tokens are a chunk of a row.
        sequence_ranks: the ranks with the other tokens, where these are a rank's share of a row.

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
    longest = 0 if packed_segments is None else packed_segments.max_keys
    if sliding_window is not None and longest > sliding_window:
        raise ModelError(
            f"a sequence of {longest} tokens exceeds the model's sliding window of "
            f"{sliding_window}: lower model.max_length to it"
        )
    # [1, heads, T, head_dim] -> [T, heads, head_dim]
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if sequence_ranks is not None:
        query, key, value = sequence_ranks.tokens_to_heads(query, key, value)
    if row_keys is not None:
        key, value = row_keys.extended(key, value)
    if packed_segments is None:
        return query[None], None
    use_flash = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    attend = flash_attention if use_flash else run_by_run_attention
    output = attend(query, key, value, packed_segments, scaling)
    if sequence_ranks is not None:
        output = sequence_ranks.heads_to_tokens(output)
    return output[None], None


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, scaling: float | None
) -> Tensor:
    """Compute it by one variable-length flash-attention call, in half precision on a GPU.

    Args:
        query: [T, num_heads, head_dim], as the output.
        key: [tokens up to the last query's, num_kv_heads, head_dim], as value.
    """
    key, value = packed.keys_among(key), packed.keys_among(value)
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
    """Compute the same on any device, in any precision: a dense batch for every run."""
    key, value = packed.keys_among(key), packed.keys_among(value)
    num_queries = [count * length for count, _, length in packed.runs]
    num_keys = [count * (prefix + length) for count, prefix, length in packed.runs]
    outputs = []
    for (count, _, _), *pieces in zip(
        packed.runs,
        query.split(num_queries),
        key.split(num_keys),
        value.split(num_keys),
        strict=True,
    ):
        # [count * tokens, heads, head_dim] -> [count, heads, tokens, head_dim]
        q, k, v = (piece.unflatten(0, (count, -1)).transpose(1, 2) for piece in pieces)
        outputs.append(_causal_attention(q, k, v, scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Compute attention in [n, heads, tokens, head_dim]; the last query is the last key's."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = None
    if num_keys > num_queries:  # what torch calls causal aligns the first query to the first key
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = ones.tril(num_keys - num_queries)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
