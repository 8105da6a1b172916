"""Inputs and outputs of a loss over a microbatch of T trained tokens, at least 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Samples of a microbatch's tokens; a sample is never split over microbatches.

    ``index`` int64 [T] counts the microbatch's samples from 0; ``lengths`` int64 [S].
    """

    index: Tensor
    lengths: Tensor

    @classmethod
    def of_lengths(cls, lengths: Tensor) -> Sequences:
        """Describe samples of these lengths [S] that lie one after the other."""
        index = torch.arange(len(lengths), device=lengths.device)
        return cls(index.repeat_interleave(lengths), lengths)

    def sum(self, values_T: Tensor) -> Tensor:
        """Return for every token the sum over its sample, [T]; differentiable."""
        return self._sums(values_T)[self.index]

    def mean(self, values_T: Tensor) -> Tensor:
        """Return for every token the mean over its sample, [T]; differentiable."""
        return (self._sums(values_T) / self.lengths)[self.index]

    def _sums(self, values_T: Tensor) -> Tensor:
        zeros = torch.zeros(len(self.lengths), dtype=values_T.dtype, device=values_T.device)
        return zeros.index_add(0, self.index, values_T)


@dataclass(frozen=True)
class LossInputs:
    """Quantities of every trained token, float32 [T]; ``logprobs`` and ``entropy`` have gradients.

    ``logprobs`` are the current policy's and ``behaviour_logprobs`` the behaviour policy's, both at
    the sampling temperature. ``entropy`` is the current distribution's at the token's position, in
    nats. ``weights`` aggregate: over all microbatches and ranks of an update they sum to the loss's
    normalisation. ``ages`` are in weight versions. ``proximal_logprobs`` (weights at the start of
    the step) and ``reference_logprobs`` are None where no loss needs them.
    """

    logprobs: Tensor
    entropy: Tensor
    sequences: Sequences
    behaviour_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    ages: Tensor
    proximal_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None


@dataclass(frozen=True)
class LossOutputs:
    """``loss``: scalar to be differentiated; ``metrics``: scalars summed over the tokens, which
    become means over all tokens of the step; ``maxima``: scalars."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


Loss = Callable[[LossInputs], LossOutputs]
