"""What one step optimises: an advantage estimator, a policy loss, and what stands around them.

An algorithm is a choice of these parts (`configs/schema/algorithm.py` names the usual ones). A step
goes through an objective twice: ``prepare`` sees the whole batch, once, as numbers, and says what
each token is worth; ``loss`` sees one microbatch at a time, with gradients. Whatever couples tokens
of different samples happens in ``prepare``, so no result depends on how a batch is split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.configs.errors import NonFiniteError
from paceline.learner.batch.tokens import BatchTokens
from paceline.learner.objective.advantages import Estimator, Pass
from paceline.learner.objective.aggregation import Aggregation, token_weights
from paceline.learner.objective.losses.corrections import Correction, SecondMoment
from paceline.learner.objective.losses.divergence import DivergenceEstimator, divergence
from paceline.learner.objective.losses.inputs import LossInputs, LossOutputs
from paceline.learner.objective.losses.policy import PolicyLoss, PolicyTerms

OldPolicy = Literal["behaviour", "recomputed", "interpolated"]
"""What the loss's ratio is relative to.

* ``behaviour``: the log-probabilities recorded when the token was sampled.
* ``recomputed``: decoupled PPO's proximal policy, the weights at the start of the step (Hilton et
  al. 2022, arXiv 2110.00641; AReaL, Fu et al. 2025, arXiv 2505.24298, eq. 5).
* ``interpolated``: A-3PO's stand-in for it (2025, arXiv 2512.06547): ``log pi_prox = (1/d) log
  pi_behaviour + (1 - 1/d) log pi`` for a token of age d, and ``log pi`` at age 0.
"""


@dataclass(frozen=True)
class Prepared:
    """``columns``: float32 [N] of what the loss reads of every token, by the field's name;
    ``returns`` [N] for a critic; ``updates``: the samples of each optimiser update, in order."""

    columns: Mapping[str, NDArray[np.float32]]
    returns: NDArray[np.float32] | None
    updates: tuple[NDArray[np.int64], ...]
    metrics: Mapping[str, float]


class Algorithm(Protocol):
    """What the learner asks of an algorithm; it must pickle."""

    @property
    def passes(self) -> frozenset[Pass]:
        """Quantities to be computed for the whole batch before ``prepare``."""

    def prepare(self, tokens: BatchTokens) -> Prepared:
        """What each token is worth."""

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Loss and metrics of a microbatch."""


@dataclass(frozen=True)
class ReferencePenalty:
    """``coefficient`` times the divergence from a frozen reference policy, in loss or reward."""

    coefficient: float
    estimator: DivergenceEstimator = "k3"
    place: Literal["loss", "reward"] = "loss"


@dataclass(frozen=True)
class OverlongPenalty:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    Nothing up to ``max_tokens - buffer_tokens``, falling linearly to ``-penalty`` at
    ``max_tokens``.
    """

    max_tokens: int
    buffer_tokens: int
    penalty: float = 1.0

    def __call__(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """What samples of these lengths [n] get on top of their reward."""
        excess = lengths - (self.max_tokens - self.buffer_tokens)
        return -self.penalty * np.clip(excess / self.buffer_tokens, 0.0, 1.0)


@dataclass(frozen=True)
class Objective:
    """Policy optimisation, put together of parts.

    ``max_tokens`` is the token limit of a completion, for ``fixed_length``. ``num_updates``
    optimiser updates share a batch, each on its own groups. ``is_sampled`` is False where samples
    are demonstrations, whose behaviour log-probabilities say nothing.
    """

    advantage: Estimator
    policy_loss: PolicyLoss
    aggregation: Aggregation
    max_tokens: int
    old_policy: OldPolicy = "behaviour"
    corrections: tuple[Correction, ...] = ()
    second_moment: SecondMoment | None = None
    reference: ReferencePenalty | None = None
    overlong: OverlongPenalty | None = None
    entropy_coefficient: float = 0.0
    num_updates: int = 1
    is_sampled: bool = True

    @property
    def passes(self) -> frozenset[Pass]:
        """What the parts need to know of every token."""
        needed = set(self.advantage.passes)
        # the first update's current weights are those of the start of the step
        if self.second_moment or (self.old_policy == "recomputed" and self.num_updates > 1):
            needed.add("proximal")
        if self.reference is not None:
            needed.add("reference")
        return frozenset(needed)

    def prepare(self, tokens: BatchTokens) -> Prepared:
        """Advantages and weights of every token, and which samples make up each update."""
        penalties = self._token_rewards(tokens)
        if self.overlong is not None:
            shaped = tokens.rewards + self.overlong(tokens.lengths)
            tokens = replace(tokens, rewards=shaped)
        estimate = self.advantage(tokens, penalties)
        updates = split_by_group(tokens.groups, self.num_updates)
        columns: dict[str, NDArray] = {
            "behaviour_logprobs": tokens.behaviour_logprobs,
            "advantages": estimate.advantages,
            "ages": tokens.ages,
            "weights": self._weights(tokens, updates),
        }
        metrics = dict(estimate.metrics)
        if self.second_moment is not None:
            keeps = self.second_moment.keeps(tokens)
            # a masked token keeps its place in the denominator
            columns["advantages"] = np.where(keeps, estimate.advantages, 0.0)
            metrics["second_moment_masked"] = 1 - keeps.mean()
        for name in ("proximal_logprobs", "reference_logprobs"):
            if (column := getattr(tokens, name)) is not None:
                columns[name] = column
        returns = None if estimate.returns is None else estimate.returns.astype(np.float32)
        columns = {name: column.astype(np.float32) for name, column in columns.items()}
        return Prepared(columns, returns, updates, metrics)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Weighted sum over a microbatch, with what it says of the policies' distance."""
        old_T = self._old_logprobs(inputs)
        terms = PolicyTerms(
            inputs.logprobs, inputs.logprobs - old_T, inputs.advantages, inputs.sequences
        )
        losses = self.policy_loss(terms)
        now_T = inputs.logprobs.detach() if self.old_policy == "behaviour" else old_T
        correction_T = self._correction(inputs, now_T - inputs.behaviour_logprobs)
        # where(): a masked token's loss may be infinite, and infinity times zero is no number
        loss_T = torch.where(correction_T == 0, 0.0, correction_T * losses.loss)
        loss_T = loss_T + self._penalty(inputs)
        with torch.no_grad():
            metrics, maxima = self._metrics(inputs, losses.is_clipped, correction_T)
        return LossOutputs((inputs.weights * loss_T).sum(), metrics, maxima)

    def _penalty(self, inputs: LossInputs) -> Tensor | float:
        """What each token costs beside the policy loss: leaving the reference, losing entropy."""
        penalty: Tensor | float = 0.0
        if self.reference is not None and self.reference.place == "loss":
            assert inputs.reference_logprobs is not None, "the reference's come first"
            away_T = inputs.reference_logprobs - inputs.logprobs
            kl_T = divergence(away_T, self.reference.estimator)
            penalty = self.reference.coefficient * kl_T
        if self.entropy_coefficient:
            penalty = penalty - self.entropy_coefficient * inputs.entropy
        return penalty

    def _metrics(
        self, inputs: LossInputs, is_clipped_T: Tensor, correction_T: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums over tokens, and maxima."""
        sums = {"entropy": inputs.entropy.sum()}
        if inputs.reference_logprobs is not None:
            away_T = inputs.reference_logprobs - inputs.logprobs
            sums["reference_kl"] = divergence(away_T, "k3").sum()
        if not self.is_sampled:
            return sums, {}
        moved, maxima = off_policy_metrics(inputs)
        corrected = {
            "clip_fraction": is_clipped_T.sum(),
            "masked_fraction": (correction_T == 0).sum(),
            "correction_weight": correction_T.sum(),
        }
        return sums | corrected | moved, maxima

    def _old_logprobs(self, inputs: LossInputs) -> Tensor:
        current_T = inputs.logprobs.detach()
        if self.old_policy == "behaviour":
            return inputs.behaviour_logprobs
        if self.old_policy == "recomputed":
            return current_T if inputs.proximal_logprobs is None else inputs.proximal_logprobs
        share_T = torch.where(inputs.ages > 0, 1 / inputs.ages.clamp(min=1), 0.0)
        return current_T + share_T * (inputs.behaviour_logprobs - current_T)

    def _correction(self, inputs: LossInputs, log_weight_T: Tensor) -> Tensor:
        weight_T = torch.ones_like(log_weight_T)
        for correction in self.corrections:
            weight_T = weight_T * correction(inputs, log_weight_T)
        return weight_T

    def _token_rewards(self, tokens: BatchTokens) -> NDArray[np.float64]:
        """The reference penalty of each token, where it is part of the reward."""
        if self.reference is None or self.reference.place == "loss":
            return np.zeros(len(tokens.behaviour_logprobs))
        assert tokens.reference_logprobs is not None, "the reference's come first"
        log_ratio = torch.from_numpy(
            tokens.reference_logprobs.astype(np.float64) - tokens.behaviour_logprobs
        )
        return -self.reference.coefficient * divergence(log_ratio, self.reference.estimator).numpy()

    def _weights(
        self, tokens: BatchTokens, updates: tuple[NDArray[np.int64], ...]
    ) -> NDArray[np.float64]:
        """What each token counts in the update that trains it."""
        weights = np.zeros(len(tokens.behaviour_logprobs))
        for samples in updates:
            of_update = np.isin(np.arange(len(tokens.lengths)), samples)
            weights[tokens.of_tokens(of_update)] = token_weights(
                self.aggregation,
                tokens.lengths[samples],
                self.max_tokens,
                len(np.unique(tokens.groups[samples])),
            )
        return weights


def off_policy_metrics(inputs: LossInputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums and maxima of how far the current policy is from the one that sampled.

    ``ratio`` r = pi / pi_behaviour and ``ratio_square`` (for the effective sample size), ``kl``
    (k3 of KL(behaviour || current)), ``mismatch`` ``|log r|``, and the same over tokens of age 0
    alone, where it shows what engine and learner disagree about.
    """
    log_ratio_T = inputs.logprobs - inputs.behaviour_logprobs
    ratio_T, mismatch_T = log_ratio_T.exp(), log_ratio_T.abs()
    is_fresh_T = inputs.ages == 0
    sums = {
        "ratio": ratio_T.sum(),
        "ratio_square": ratio_T.square().sum(),
        "kl": divergence(log_ratio_T, "k3").sum(),
        "mismatch": mismatch_T.sum(),
        "fresh_mismatch": (mismatch_T * is_fresh_T).sum(),
        "fresh_fraction": is_fresh_T.sum(),
    }
    return sums, {"ratio_max": ratio_T.max(), "mismatch_max": mismatch_T.max()}


def derived_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """From means over all tokens to what is recorded.

    ``ess`` is Kish's effective sample size of the importance weights as a share of all tokens,
    ``mean(r)^2 / mean(r^2)``; ``mismatch_fresh`` the mismatch of tokens of age 0, where there are
    any.
    """
    derived = dict(means)
    square = derived.pop("ratio_square", None)
    if square is not None:
        derived["ess"] = derived["ratio"] ** 2 / square
    fresh, share = derived.pop("fresh_mismatch", 0.0), derived.get("fresh_fraction", 0.0)
    if share:
        derived["mismatch_fresh"] = fresh / share
    return derived


def split_by_group(groups: NDArray[np.int64], num_updates: int) -> tuple[NDArray[np.int64], ...]:
    """Samples [n] of each of ``num_updates`` updates: groups stay whole, shares are even.

    With fewer groups than updates there are as many updates as groups.
    """
    num_groups = int(groups.max()) + 1
    shares = np.array_split(np.arange(num_groups), min(num_updates, num_groups))
    return tuple(np.flatnonzero(np.isin(groups, share)) for share in shares)


def check_advantages(tokens: BatchTokens, advantages: NDArray[np.float32]) -> None:
    """Refuse advantages that are not finite.

    Raises:
        NonFiniteError: names the first sample and token.
    """
    assert advantages.shape == tokens.behaviour_logprobs.shape, "one advantage a trained token"
    bad = np.flatnonzero(~np.isfinite(advantages))
    if len(bad):
        sample = int(np.searchsorted(tokens.starts, bad[0], side="right")) - 1
        raise NonFiniteError(
            f"the advantage of {tokens.name_of(sample)} is {advantages[bad[0]]} at its trained "
            f"token {bad[0] - tokens.starts[sample]}: a finite number is needed; look at its "
            "reward and at what the estimator divides by"
        )
