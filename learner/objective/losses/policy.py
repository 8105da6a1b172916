"""Policy losses: how a token's advantage moves its probability.

A policy loss is any picklable callable ``PolicyTerms -> TokenLosses``: a loss of each of T tokens,
without weighting. The objective aggregates, masks and adds penalties, in the same way for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.learner.objective.losses.inputs import Sequences


@dataclass(frozen=True)
class PolicyTerms:
    """Terms of each token, [T]: ``logprobs`` and the log importance ratio ``log_ratio`` =
    log(pi / pi_old), both with gradient, and ``advantages``."""

    logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    sequences: Sequences


@dataclass(frozen=True)
class TokenLosses:
    """``loss`` [T]; ``is_clipped`` bool [T]: the clip range bound this token."""

    loss: Tensor
    is_clipped: Tensor


PolicyLoss = Callable[[PolicyTerms], TokenLosses]


@dataclass(frozen=True)
class Clip:
    """PPO's clipped surrogate: ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``.

    Schulman et al. 2017 (arXiv 1707.06347, eq. 7); a clip range of two bounds is DAPO's (Yu et
    al. 2025, arXiv 2503.14476, eq. 10). ``dual_clip`` c > 1 bounds the objective from below where
    A < 0, ``max(., c A)`` (Ye et al. 2020, arXiv 1912.09729, eq. 2).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    def __call__(self, terms: PolicyTerms) -> TokenLosses:
        """Return the loss of each token by its own ratio."""
        losses = clipped_surrogate(terms.log_ratio, terms.advantages, self.clip_low, self.clip_high)
        if self.dual_clip is None:
            return losses
        ceiling = -self.dual_clip * terms.advantages
        is_bounded = (terms.advantages < 0) & (losses.loss > ceiling)
        return TokenLosses(
            torch.where(is_bounded, ceiling, losses.loss), losses.is_clipped | is_bounded
        )


@dataclass(frozen=True)
class SequenceClip:
    """GSPO: the clipped surrogate with the importance ratio of whole sequences.

    Zheng et al. 2025 (arXiv 2507.18071, eq. 5-7): ``s = (pi(y) / pi_old(y))^(1/|y|)``, the same for
    every token of a sample. With the mean over each sequence this is the paper's loss. Without
    ``length_normalized`` s is the ratio itself, as in TRL's RLOO.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    length_normalized: bool = True

    def __call__(self, terms: PolicyTerms) -> TokenLosses:
        """Return the loss of each token by its sample's ratio."""
        over_sample = terms.sequences.mean if self.length_normalized else terms.sequences.sum
        log_ratio_T = over_sample(terms.log_ratio)
        return clipped_surrogate(log_ratio_T, terms.advantages, self.clip_low, self.clip_high)


@dataclass(frozen=True)
class ClippedWeight:
    """REINFORCE with a clipped importance weight: ``-sg(clip(r, low, high)) A log pi``.

    CISPO (MiniMax 2025, arXiv 2506.13585, eq. 4-5) bounds ``1 - clip_low <= r <= 1 + clip_high``;
    AIPO (LlamaRL, Wu et al. 2025, arXiv 2505.24034, eq. 4) is ``min(r, rho)`` with rho in 2 to 10.
    Every token has a gradient, unlike under a clipped surrogate.
    """

    low: float = 0.0
    high: float = 2.0

    def __call__(self, terms: PolicyTerms) -> TokenLosses:
        """Return the loss of each token; the weight carries no gradient."""
        ratio_T = terms.log_ratio.detach().exp()
        weight_T = ratio_T.clamp(self.low, self.high)
        loss_T = -weight_T * terms.advantages * terms.logprobs
        return TokenLosses(loss_T, weight_T != ratio_T)


@dataclass(frozen=True)
class Reinforce:
    """The plain policy gradient ``-A log pi`` (Williams 1992), right for on-policy samples."""

    def __call__(self, terms: PolicyTerms) -> TokenLosses:
        """Return the loss of each token."""
        loss_T = -terms.advantages * terms.logprobs
        return TokenLosses(loss_T, torch.zeros_like(loss_T, dtype=torch.bool))


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Supervised fine-tuning: ``-log pi``, whatever the advantage."""

    def __call__(self, terms: PolicyTerms) -> TokenLosses:
        """Return the loss of each token."""
        return TokenLosses(-terms.logprobs, torch.zeros_like(terms.logprobs, dtype=torch.bool))


def clipped_surrogate(
    log_ratio_T: Tensor, advantages_T: Tensor, clip_low: float, clip_high: float
) -> TokenLosses:
    """Return ``-min(r A, clip(r) A)``; clipped is a token whose gradient is zero by the clip."""
    ratio_T = log_ratio_T.exp()
    bounded_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    unclipped_T = ratio_T * advantages_T
    clipped_T = bounded_T * advantages_T
    return TokenLosses(-torch.minimum(unclipped_T, clipped_T), (clipped_T < unclipped_T).detach())
