"""Corrections of off-policy samples and of mismatch between engine and learner.

A correction is any picklable callable that gives each of T tokens a weight, without gradient, by
its importance weight w = pi_now / pi_behaviour, given as ``log_weight_T``. ``pi_now`` is pi_old of
the loss's own ratio (the proximal policy), or the current policy where pi_old is the behaviour
policy. Weights of several corrections multiply. The loss is still divided by all tokens, so a
masked token counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.learner.batch.tokens import BatchTokens
from paceline.learner.objective.losses.inputs import LossInputs

Correction = Callable[[LossInputs, Tensor], Tensor]
Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class Truncate:
    """TIS, truncated importance sampling: ``min(w, cap)``.

    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training";
    Espeholt et al. 2018 (arXiv 1802.01561). At ``level: sequence`` w is the product over a sample.
    """

    cap: float = 2.0
    level: Level = "token"

    def __call__(self, inputs: LossInputs, log_weight_T: Tensor) -> Tensor:
        """Return weights in [0, cap]."""
        return importance_weight(inputs, log_weight_T, self.level).clamp(max=self.cap)


@dataclass(frozen=True)
class MaskAbove:
    """MIS, masked importance sampling: w where ``w <= cap``, else 0.

    Liu, Li et al. 2025, "When speed kills stability"; at ``level: sequence`` w is the product over
    a sample.
    """

    cap: float = 2.0
    level: Level = "token"

    def __call__(self, inputs: LossInputs, log_weight_T: Tensor) -> Tensor:
        """Return weights in [0, cap]; at the sequence level whole samples are masked."""
        weight_T = importance_weight(inputs, log_weight_T, self.level)
        return torch.where(weight_T <= self.cap, weight_T, 0.0)


@dataclass(frozen=True)
class MaskOutside:
    """IcePop: w where ``low <= w <= high``, else 0 (Ling team 2025, "Every step evolves", arXiv
    2510.18855, eq. 1)."""

    low: float = 0.5
    high: float = 5.0

    def __call__(self, inputs: LossInputs, log_weight_T: Tensor) -> Tensor:
        """Return weights in {0} and [low, high]."""
        weight_T = log_weight_T.exp()
        return torch.where((weight_T >= self.low) & (weight_T <= self.high), weight_T, 0.0)


@dataclass(frozen=True)
class RejectSequences:
    """Geometric sequence rejection: 1 where ``low <= (prod w)^(1/length) <= high``, else 0.

    Liu, Li et al. 2025 (as above): the mean makes the bound independent of a sample's length.
    """

    low: float = 0.999
    high: float = 1.001

    def __call__(self, inputs: LossInputs, log_weight_T: Tensor) -> Tensor:
        """Return 0 or 1, the same for all tokens of a sample."""
        mean_T = inputs.sequences.mean(log_weight_T)
        inside_T = (mean_T >= math.log(self.low)) & (mean_T <= math.log(self.high))
        return inside_T.to(log_weight_T.dtype)


@dataclass(frozen=True)
class MaskMastered:
    """UloRL's dynamic masking of well-mastered positive tokens.

    Du et al. 2025 (arXiv 2507.19766, section 3.3): training on tokens of positive advantage and
    probability near 1 only lowers the entropy. Weight 0 where advantage > 0, probability >=
    ``probability`` and the mean entropy of the token's sample < ``entropy`` nats; else 1.
    """

    probability: float = 0.99
    entropy: float = 0.2

    def __call__(self, inputs: LossInputs, log_weight_T: Tensor) -> Tensor:
        """Return 0 or 1 for every token."""
        is_likely_T = inputs.logprobs.detach() >= math.log(self.probability)
        is_low_entropy_T = inputs.sequences.mean(inputs.entropy.detach()) < self.entropy
        is_mastered_T = (inputs.advantages > 0) & is_likely_T & is_low_entropy_T
        return (~is_mastered_T).to(log_weight_T.dtype)


@dataclass(frozen=True)
class SecondMoment:
    """M2PO: mask as few tokens as needed for the second moment of the log-ratio to be small.

    Zheng et al. 2025 (arXiv 2510.01161): the tokens with the largest ``(log pi_now - log
    pi_behaviour)^2`` are dropped until its mean over those left is at most ``threshold``, over the
    whole batch.
    """

    threshold: float = 0.04

    def keeps(self, tokens: BatchTokens) -> NDArray[np.bool_]:
        """Tell which tokens are trained on, bool [N]."""
        assert tokens.proximal_logprobs is not None, "log-probabilities come first"
        log_ratio = tokens.proximal_logprobs.astype(np.float64) - tokens.behaviour_logprobs
        smallest_first = np.argsort(log_ratio**2, kind="stable")
        sums = np.cumsum(log_ratio[smallest_first] ** 2)
        is_small = sums <= self.threshold * np.arange(1, len(log_ratio) + 1)
        keep = np.zeros(len(log_ratio), dtype=np.bool_)
        # means of growing sets of the smallest never fall: those up to the last small one are kept
        keep[smallest_first[: int(is_small.sum())]] = True
        return keep


def importance_weight(inputs: LossInputs, log_weight_T: Tensor, level: Level) -> Tensor:
    """Return w of each token, or the product of w over its sample; [T]."""
    if level == "sequence":
        log_weight_T = inputs.sequences.sum(log_weight_T)
    return log_weight_T.exp()
