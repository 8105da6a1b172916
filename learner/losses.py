"""Losses: from log-probabilities of trained tokens to a sum that is differentiated.

A loss is any picklable callable ``LossInputs -> LossOutputs``. It returns a *sum* over its tokens;
the learner divides by the number of trained tokens of the whole batch, so the result does not
depend on how the batch was split into microbatches and ranks. T is the number of trained tokens of
one microbatch, at least 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paceline.configs.errors import UserError


class NonFiniteError(UserError):
    """A number that the update depends on is infinite or not a number; no weight was written."""


@dataclass(frozen=True)
class LossInputs:
    """Of every trained token of a microbatch, float32 [T]; only ``logprobs`` carries a gradient.

    ``logprobs`` are under the current weights and ``behaviour_logprobs`` under the weights that
    sampled the token, both at the sampling temperature; ``entropy`` is that of the current
    distribution at the token's position, in nats.
    """

    logprobs: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class LossOutputs:
    """``loss_sum`` scalar; ``metrics`` scalars summed over the tokens; ``maxima`` scalars."""

    loss_sum: Tensor
    metrics: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


Loss = Callable[[LossInputs], LossOutputs]


@dataclass(frozen=True)
class ClippedPolicyLoss:
    """Clipped surrogate objective with the sampling policy as the old one, a sum over tokens.

    ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = exp(logprob - behaviour)``:
    Schulman et al. 2017 (arXiv 1707.06347) eq. 7, with DAPO's asymmetric range (Yu et al. 2025,
    arXiv 2503.14476, eq. 8). The ratio is to the log-probabilities recorded when the token was
    sampled, which is what keeps training stable on tokens of older weights.
    """

    clip_low: float
    clip_high: float

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Loss and off-policy metrics of a microbatch."""
        log_ratio_T = inputs.logprobs - inputs.behaviour_logprobs
        ratio_T = log_ratio_T.exp()
        clipped_T = ratio_T.clamp(1 - self.clip_low, 1 + self.clip_high)
        objective_T = torch.minimum(ratio_T * inputs.advantages, clipped_T * inputs.advantages)
        with torch.no_grad():
            mismatch_T = log_ratio_T.abs()
            # the min picked the constant branch: this token's gradient is zero
            is_clipped_T = clipped_T * inputs.advantages < ratio_T * inputs.advantages
            metrics = {
                "ratio": ratio_T.sum(),
                "clip_fraction": is_clipped_T.sum(),
                "entropy": inputs.entropy.sum(),
                "kl": kl_estimate(log_ratio_T).sum(),
                "mismatch": mismatch_T.sum(),
            }
            maxima = {"ratio_max": ratio_T.max(), "mismatch_max": mismatch_T.max()}
        return LossOutputs(-objective_T.sum(), metrics, maxima)


def negative_log_likelihood(inputs: LossInputs) -> LossOutputs:
    """Supervised loss ``-log p``, a sum over tokens; advantages and behaviour are ignored."""
    return LossOutputs(-inputs.logprobs.sum(), {"entropy": inputs.entropy.sum()})


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(behaviour || current) from behaviour samples.

    ``k3 = (r - 1) - log r`` with ``r = current / behaviour`` (Schulman 2020, "Approximating KL
    divergence"); any shape.
    """
    return log_ratio.expm1() - log_ratio
