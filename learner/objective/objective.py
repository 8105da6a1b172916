"""Objective of a step: advantage estimator, policy loss, corrections, penalties, aggregation.

An algorithm is a choice of these parts (`configs/schema/algorithm.py` names the usual ones). A step
calls an objective in two ways. ``prepare`` sees the whole batch once, without gradients, and
computes advantages and weights. ``loss`` sees one microbatch at a time, with gradients. Whatever
couples tokens of different samples happens in ``prepare``, so no result depends on how a batch is
split.
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
"""The policy pi_old in the loss's importance ratio pi / pi_old.

* ``behaviour``: the policy that sampled, by the log-probabilities recorded with each token.
* ``recomputed``: decoupled PPO's proximal policy, the weights at the start of the step (Hilton et
  al. 2022, arXiv 2110.00641; AReaL, Fu et al. 2025, arXiv 2505.24298, eq. 5).
* ``interpolated``: A-3PO's stand-in for it (2025, arXiv 2512.06547): ``log pi_prox = (1/d) log
  pi_behaviour + (1 - 1/d) log pi`` for a token of age d, and ``log pi`` at age 0.
"""


@dataclass(frozen=True)
class Prepared:
    """A batch ready for its losses: ``columns`` float32 [N] are fields of ``LossInputs`` by name,
    ``returns`` float32 [N] a critic's targets, ``updates`` each optimiser update's samples."""

    columns: Mapping[str, NDArray[np.float32]]
    returns: NDArray[np.float32] | None
    updates: tuple[NDArray[np.int64], ...]
    metrics: Mapping[str, float]


class Algorithm(Protocol):
    """Interface that the learner needs of an algorithm; it must pickle."""

    @property
    def passes(self) -> frozenset[Pass]:
        """Quantities to be computed for the whole batch before ``prepare``."""

    def prepare(self, tokens: BatchTokens) -> Prepared:
        """Return every token's advantage and weight, for the whole batch."""

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Return loss and metrics of a microbatch."""


@dataclass(frozen=True)
class ReferencePenalty:
    """``coefficient`` times the estimated KL divergence from a frozen reference policy."""

    coefficient: float
    estimator: DivergenceEstimator = "k3"
    place: Literal["loss", "reward"] = "loss"


@dataclass(frozen=True)
class OverlongPenalty:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    It is 0 up to ``max_tokens - buffer_tokens`` and falls linearly to ``-penalty`` at
    ``max_tokens``.
    """

    max_tokens: int
    buffer_tokens: int
    penalty: float = 1.0

    def __call__(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what is added to the rewards of samples of these lengths [n], float64 [n]."""
        excess = lengths - (self.max_tokens - self.buffer_tokens)
        return -self.penalty * np.clip(excess / self.buffer_tokens, 0.0, 1.0)


@dataclass(frozen=True)
class Objective:
    """Policy optimisation, composed of parts.

    ``max_tokens`` is the token limit of a completion, for ``fixed_length``. ``num_updates``
    optimiser updates share a batch, each on its own groups. ``is_sampled`` is False where samples
    are demonstrations, which have no behaviour policy.
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
        """Quantities that the parts need of every token."""
        needed = set(self.advantage.passes)
        # the first update's current weights are those of the start of the step
        if self.second_moment or (self.old_policy == "recomputed" and self.num_updates > 1):
            needed.add("proximal")
        if self.reference is not None:
            needed.add("reference")
        return frozenset(needed)

    def prepare(self, tokens: BatchTokens) -> Prepared:
        """Return advantages and weights of every token, and the samples of each update."""
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
        """Return the weighted sum over a microbatch, with off-policy metrics."""
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
        """Return KL penalty less entropy bonus of each token, [T]; 0 where there is neither."""
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
        """Return metrics to be summed over tokens, and maxima."""
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
        """Return minus the KL penalty of each token, [N]; zeros where it is part of the loss."""
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
        """Return each token's weight in the update that trains on it, [N]."""
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
    """Return sums and maxima of the current policy's distance from the behaviour policy.

    Sums of the importance ratio ``ratio`` r = pi / pi_behaviour and ``ratio_square`` (for the
    effective sample size), ``kl`` (k3 of KL(behaviour || current)) and ``mismatch`` ``|log r|``.
    ``fresh_mismatch`` is over tokens of age 0 alone, where engine and learner have equal weights.
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
    """Return the metrics that are recorded, from means over all tokens.

    ``ess`` is Kish's effective sample size of the importance weights as a share of all tokens,
    ``mean(r)^2 / mean(r^2)``. ``mismatch_fresh`` is the mismatch of tokens of age 0, if there are
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
    """Return the samples of each of ``num_updates`` updates: groups whole, shares even.

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
