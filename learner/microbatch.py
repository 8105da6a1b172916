"""From a rank's share of a batch to tensors: packed rows and the tokens to be predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.configs.vocabulary import TrainSample
from paceline.learner.attention import PackedSegments, Segment
from paceline.learner.bundles import Bundle
from paceline.learner.model import PackedRow


@dataclass(frozen=True)
class Microbatch:
    """One packed row and its T trained tokens.

    Trained tokens come sample by sample in the order of ``samples`` (indices into what it was built
    from), of ``lengths`` int64 [S]; ``targets`` int64 [T] are the tokens themselves. Without
    samples it is a single padding token and T = 0: a pass that costs nothing but keeps ranks in
    step.
    """

    samples: tuple[int, ...]
    row: PackedRow
    targets: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Placement:
    """Where a sample lies in a row: its first ``prefix`` tokens, shared with siblings, from
    ``prefix_start`` on and the others from ``start`` on (prefix 0: all of them)."""

    sample: int
    prefix: int
    prefix_start: int
    start: int

    def predictors(self, num_tokens: int) -> NDArray[np.int64]:
        """For each token of the sample, the place of the one before it; of the first, nonsense."""
        before = np.arange(-1, num_tokens - 1)
        return before + np.where(before < self.prefix, self.prefix_start, self.start - self.prefix)


def build_microbatch(
    bundles: Sequence[Bundle], samples: Sequence[TrainSample], device: torch.device
) -> Microbatch:
    """Lay bundles of ``samples`` into one row, and find the tokens they train."""
    if not bundles:
        return _padding(device)
    segments, tokens, placements = _lay_out(bundles, samples)
    packed = PackedSegments.from_segments(segments, device)
    chosen = tuple(placement.sample for placement in placements)
    trained = np.concatenate([samples[index].loss_mask for index in chosen])

    def of_trained(arrays: Iterable[NDArray]) -> Tensor:
        return torch.from_numpy(np.concatenate(list(arrays))[trained]).to(device, torch.int64)

    predictors = (p.predictors(len(samples[p.sample].token_ids)) for p in placements)
    row = PackedRow(
        token_ids=torch.from_numpy(np.concatenate(tokens)).to(device, torch.int64)[None],
        positions=packed.positions().to(device)[None],
        segments=packed,
        predictors=of_trained(predictors),
    )
    lengths = torch.tensor([int(samples[i].loss_mask.sum()) for i in chosen], device=device)
    return Microbatch(chosen, row, of_trained(samples[i].token_ids for i in chosen), lengths)


def _lay_out(
    bundles: Sequence[Bundle], samples: Sequence[TrainSample]
) -> tuple[list[Segment], list[NDArray[np.int32]], list[Placement]]:
    """Whole samples and prompts, longest first; then what samples add to prompts, likewise.

    Equal shapes lie side by side. A sample may add nothing: its one trained token is predicted by
    the prompt.
    """
    segments, tokens = [], []
    roots: list[tuple[Bundle, int]] = []
    end = 0
    for bundle in sorted(bundles, key=lambda bundle: -bundle.first_length):
        roots.append((bundle, end))
        segments.append(Segment(end, bundle.first_length))
        tokens.append(samples[bundle.samples[0]].token_ids[: bundle.first_length])
        end += bundle.first_length
    continuations = [
        (bundle.prefix, length, root, sample)
        for bundle, root in roots
        for length, sample in zip(bundle.own_lengths, bundle.samples, strict=True)
    ]
    placements = []
    for prefix, length, root, sample in sorted(continuations, reverse=True):
        if not prefix:
            placements.append(Placement(sample, 0, root, root))
            continue
        placements.append(Placement(sample, prefix, root, end))
        if length:
            segments.append(Segment(end, length, root, prefix))
            tokens.append(samples[sample].token_ids[prefix : prefix + length])
            end += length
    return segments, tokens, placements


def _padding(device: torch.device) -> Microbatch:
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    packed = PackedSegments.from_segments([Segment(0, 1)], device)
    return Microbatch((), PackedRow(zero, zero, packed, nothing), nothing, nothing)
