"""From a rank's share of a batch to tensors: packed rows and the quantities of trained tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.configs.vocabulary import TrainSample
from paceline.learner.attention import PackedSequences
from paceline.learner.losses import NonFiniteError
from paceline.learner.model import PackedRow


@dataclass(frozen=True)
class Microbatch:
    """One packed row and, of its N trained tokens in row order, what the loss needs.

    ``targets`` int64 [N]; ``behaviour_logprobs`` and ``advantages`` float32 [N]. Without samples it
    is a single padding token and N = 0: a pass that costs nothing but keeps ranks in step.
    """

    row: PackedRow
    targets: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor


def num_inputs(sample: TrainSample) -> int:
    """Tokens the model must read to predict the sample's trained ones: all before the last of them.

    0 where nothing is trained.
    """
    trained = np.flatnonzero(sample.loss_mask)
    if not len(trained):
        return 0
    assert trained[0] > 0, "the first token of a sample has nothing before it to predict it"
    return int(trained[-1])


def build_microbatch(samples: Sequence[TrainSample], device: torch.device) -> Microbatch:
    """Pack samples in the order given; each needs ``num_inputs`` of at least 1."""
    if not samples:
        return _padding(device)
    lengths = [num_inputs(sample) for sample in samples]
    # position t of a sample predicts its token t + 1
    trained = _join([s.loss_mask[1 : n + 1] for s, n in zip(samples, lengths, strict=True)])

    def of_trained(arrays: list[NDArray[np.generic]], dtype: torch.dtype) -> Tensor:
        following = _join([a[1 : n + 1] for a, n in zip(arrays, lengths, strict=True)])
        return torch.from_numpy(following[trained]).to(device, dtype)

    sequences = PackedSequences.from_lengths(lengths, device)
    inputs = _join([s.token_ids[:n] for s, n in zip(samples, lengths, strict=True)])
    row = PackedRow(
        token_ids=torch.from_numpy(inputs).to(device, torch.int64)[None],
        positions=sequences.positions().to(device)[None],
        sequences=sequences,
        predictors=torch.from_numpy(np.flatnonzero(trained)).to(device),
    )
    return Microbatch(
        row,
        targets=of_trained([s.token_ids for s in samples], torch.int64),
        behaviour_logprobs=of_trained([s.logprobs for s in samples], torch.float32),
        advantages=of_trained([s.advantages for s in samples], torch.float32),
    )


def check_finite(samples: Sequence[TrainSample], step: int) -> None:
    """Refuse a batch whose advantages or behaviour log-probabilities are not all finite.

    Raises:
        NonFiniteError: names the quantity and the first sample and token.
    """
    for name in ("advantages", "logprobs"):
        for index, sample in enumerate(samples):
            bad = sample.loss_mask & ~np.isfinite(getattr(sample, name))
            if bad.any():
                token = int(bad.argmax())
                value = getattr(sample, name)[token]
                raise NonFiniteError(
                    f"step {step}: {name} of sample {index} are {value} at token {token}; "
                    "finite numbers are needed: look at its rewards and sampling"
                )


def _padding(device: torch.device) -> Microbatch:
    nothing = torch.zeros(0, device=device)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    row = PackedRow(zero, zero, PackedSequences.from_lengths([1], device), nothing.long())
    return Microbatch(row, nothing.long(), nothing, nothing)


def _join(arrays: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    return np.concatenate(arrays)
