"""From a rank's share of a batch to tensors: packed rows and the tokens to be predicted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.configs.vocabulary import NOT_ROUTED
from paceline.learner.batch.bundles import Bundle
from paceline.learner.batch.sequences import TokenSequence
from paceline.learner.model.attention import PackedSegments, Segment
from paceline.learner.model.model import PackedRow

NO_TOKENS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Microbatch:
    """One packed row, whose trained tokens come sample by sample in the order of ``samples``
    (indices into what it was built from), ``lengths`` int64 [S] of each.

    Without samples it is nothing but padding and trains no token: a pass that costs little but
    keeps ranks in step.
    """

    samples: tuple[int, ...]
    row: PackedRow
    lengths: Tensor
    num_padding_tokens: int


class SampleSlice(NamedTuple):
    """Tokens ``[start, stop)`` of a sample."""

    sample: int
    start: int
    stop: int


@dataclass(frozen=True)
class SamplePlacement:
    """Place of a sample in a row: its first ``prefix`` tokens, shared with siblings, from
    ``prefix_start`` on and the others from ``start`` on (prefix 0: all of them)."""

    sample: int
    prefix: int
    prefix_start: int
    start: int

    def predictors(self, num_prompt: int, num_tokens: int) -> NDArray[np.int64]:
        """Return the place in the row of what comes before each completion token, int64 [C]."""
        before = np.arange(num_prompt - 1, num_tokens - 1)
        return before + np.where(before < self.prefix, self.prefix_start, self.start - self.prefix)


def build_microbatch(
    bundles: Sequence[Bundle],
    sequences: Sequence[TokenSequence],
    device: torch.device,
    multiple_of: int = 1,
) -> Microbatch:
    """Lay bundles of ``sequences`` into one row, and find the tokens they train.

    The row is padded to a ``multiple_of`` some number, and to one token at least, by a sequence of
    its own, which trains nothing.
    """
    segments, pieces, placements = _lay_out(bundles)
    num_tokens = sum(bundle.num_tokens for bundle in bundles)
    num_padding = max(1, math.ceil(num_tokens / multiple_of)) * multiple_of - num_tokens
    if num_padding:
        segments.append(Segment(num_tokens, num_padding))
    tokens = [sequences[piece.sample].token_ids[piece.start : piece.stop] for piece in pieces]
    tokens.append(np.zeros(num_padding, dtype=np.int32))
    experts = _routed_experts(pieces, sequences, num_padding)
    packed = PackedSegments.from_segments(segments, device)
    chosen = tuple(placement.sample for placement in placements)

    def of_trained(arrays: Iterable[NDArray]) -> Tensor:
        return torch.from_numpy(np.concatenate([NO_TOKENS, *arrays])).to(device, torch.int64)

    placed = [(placement, sequences[placement.sample]) for placement in placements]
    row = PackedRow(
        token_ids=torch.from_numpy(np.concatenate(tokens)).to(device, torch.int64)[None],
        positions=packed.positions().to(device)[None],
        segments=packed,
        predictors=of_trained(p.predictors(s.num_prompt, len(s.token_ids)) for p, s in placed),
        targets=of_trained(s.token_ids[s.num_prompt :] for _, s in placed),
        routed_experts=None if experts is None else experts.to(device, torch.int64),
    )
    lengths = [sequence.num_completion for _, sequence in placed]
    lengths_S = torch.tensor(lengths, dtype=torch.int64, device=device)
    return Microbatch(chosen, row, lengths_S, num_padding)


def _routed_experts(
    pieces: Sequence[SampleSlice], sequences: Sequence[TokenSequence], num_padding: int
) -> Tensor | None:
    """Return the experts of every token of the row, int16 [T, layers, K]; None without any."""
    known = [sequences[piece.sample].routed_experts for piece in pieces]
    of_token = next((experts.shape[1:] for experts in known if experts is not None), None)
    if of_token is None:
        return None
    unknown = np.int16(NOT_ROUTED)
    parts = [
        np.full((piece.stop - piece.start, *of_token), unknown)
        if experts is None
        else experts[piece.start : piece.stop]
        for piece, experts in zip(pieces, known, strict=True)
    ]
    return torch.from_numpy(np.concatenate([*parts, np.full((num_padding, *of_token), unknown)]))


def _lay_out(
    bundles: Sequence[Bundle],
) -> tuple[list[Segment], list[SampleSlice], list[SamplePlacement]]:
    """Place whole samples and prompts, longest first; then what samples add to prompts, likewise.

    Equal shapes lie side by side. A sample may add nothing: its one trained token is predicted by
    the prompt.
    """
    segments, pieces = [], []
    roots: list[tuple[Bundle, int]] = []
    end = 0
    for bundle in sorted(bundles, key=lambda bundle: -bundle.first_length):
        roots.append((bundle, end))
        segments.append(Segment(end, bundle.first_length))
        pieces.append(SampleSlice(bundle.samples[0], 0, bundle.first_length))
        end += bundle.first_length
    continuations = [
        (bundle.prefix, length, root, sample)
        for bundle, root in roots
        for length, sample in zip(bundle.own_lengths, bundle.samples, strict=True)
    ]
    placements = []
    for prefix, length, root, sample in sorted(continuations, reverse=True):
        if not prefix:
            placements.append(SamplePlacement(sample, 0, root, root))
            continue
        placements.append(SamplePlacement(sample, prefix, root, end))
        if length:
            segments.append(Segment(end, length, root, prefix))
            pieces.append(SampleSlice(sample, prefix, prefix + length))
            end += length
    return segments, pieces, placements
