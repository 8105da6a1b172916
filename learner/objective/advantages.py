"""Advantages: how much better than expected each trained token turned out (pure, numpy only).

An estimator is any picklable callable ``BatchTokens -> Estimate`` with ``passes``, the quantities
that must have been computed for it. It sees the whole batch, on every rank the same.

Shapes: n samples, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.learner.batch.tokens import BatchTokens

Floats = NDArray[np.float64]
Pass = Literal["proximal", "reference", "values", "teacher"]
"""Quantity of every token that takes a forward pass to compute, named as in ``BatchTokens``."""


@dataclass(frozen=True)
class Estimate:
    """``advantages`` float64 [N]; ``returns`` float64 [N], a critic's targets; ``metrics`` of the
    batch."""

    advantages: Floats
    returns: Floats | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Estimator(Protocol):
    """Function that computes the advantages of a whole batch."""

    @property
    def passes(self) -> frozenset[Pass]:
        """Quantities that it reads beside behaviour log-probabilities."""

    def __call__(self, tokens: BatchTokens, token_rewards: Floats) -> Estimate:
        """Return advantages.

        ``token_rewards`` float64 [N] are added to the samples' rewards. They are the negative KL
        penalty against the reference policy where that is part of the reward, else zeros.
        """


@dataclass(frozen=True)
class GroupRelative:
    """A sample's outcome against the mean of its group.

    GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2): ``(r - mean) / (std + epsilon)``, with
    the sample standard deviation (n - 1); without ``normalize_std`` it is Dr.GRPO's ``r - mean``
    (Liu et al. 2025, arXiv 2503.20783, eq. 3). Equal rewards give exactly zero.
    """

    normalize_std: bool = True
    epsilon: float = 1e-6
    passes: ClassVar[frozenset[Pass]] = frozenset()

    def __call__(self, tokens: BatchTokens, token_rewards: Floats) -> Estimate:
        """Return for every token the group-relative outcome of its sample."""
        centred = centred_in_group(tokens, outcomes(tokens, token_rewards))
        if self.normalize_std:
            counts = np.bincount(tokens.groups)
            squares = np.bincount(tokens.groups, weights=centred**2)
            std = np.sqrt(squares / np.maximum(counts - 1, 1))
            centred = centred / (std[tokens.groups] + self.epsilon)
        return Estimate(tokens.of_tokens(centred))


@dataclass(frozen=True)
class LeaveOneOut:
    """RLOO: a sample's outcome against the mean of its siblings.

    Ahmadian et al. 2024 (arXiv 2402.14740, section 3.3): ``r_i - mean_{j != i} r_j``, which equals
    ``n / (n - 1)`` times the centred outcome. A group of one has no sibling and gets zero.
    """

    passes: ClassVar[frozenset[Pass]] = frozenset()

    def __call__(self, tokens: BatchTokens, token_rewards: Floats) -> Estimate:
        """Return for every token the leave-one-out outcome of its sample."""
        counts = np.bincount(tokens.groups)[tokens.groups]
        centred = centred_in_group(tokens, outcomes(tokens, token_rewards))
        return Estimate(tokens.of_tokens(centred * counts / np.maximum(counts - 1, 1)))


@dataclass(frozen=True)
class BatchNormalized:
    """REINFORCE++: outcomes normalised over the whole batch.

    Hu et al. 2025 (arXiv 2501.03262, eq. 9): ``(A - mean(A)) / std(A)`` over all tokens of the
    batch, where a token's A is its sample's outcome minus the penalties before it
    (``A_t = r - beta sum_{i >= t} KL_i``); with ``baseline: group`` the outcome is first centred in
    its group (REINFORCE++-baseline, eq. 11).
    """

    baseline: Literal["none", "group"] = "none"
    epsilon: float = 1e-8
    passes: ClassVar[frozenset[Pass]] = frozenset()

    def __call__(self, tokens: BatchTokens, token_rewards: Floats) -> Estimate:
        """Return the normalised return of every token."""
        if self.baseline == "group":
            centred = centred_in_group(tokens, outcomes(tokens, token_rewards))
            returns = tokens.of_tokens(centred)
        else:
            returns = tokens.of_tokens(tokens.rewards) + sums_from_here(tokens, token_rewards)
        return Estimate(whitened(returns, self.epsilon))


@dataclass(frozen=True)
class Outcome:
    """REINFORCE without a baseline: the outcome itself (Williams 1992)."""

    passes: ClassVar[frozenset[Pass]] = frozenset()

    def __call__(self, tokens: BatchTokens, token_rewards: Floats) -> Estimate:
        """Return for every token the outcome of its sample."""
        return Estimate(tokens.of_tokens(outcomes(tokens, token_rewards)))


@dataclass(frozen=True)
class GeneralizedAdvantage:
    """GAE with a critic.

    Schulman et al. 2016 (arXiv 1506.02438, eq. 16): ``delta_t = r_t + gamma V_{t+1} - V_t`` and
    ``A_t = delta_t + gamma lambda A_{t+1}``. The reward arrives with the last token. The state
    after it has value 0, also where the token limit ended the sample. The critic's targets are
    ``A_t + V_t``; ``normalize`` then whitens advantages over the batch.
    """

    discount: float = 1.0
    trace_decay: float = 1.0
    normalize: bool = True
    passes: ClassVar[frozenset[Pass]] = frozenset({"values"})

    def __call__(self, tokens: BatchTokens, token_rewards: Floats) -> Estimate:
        """Return advantages, and returns as the critic's targets."""
        assert tokens.values is not None, "the critic's values come first"
        values = tokens.values.astype(np.float64)
        rewards = token_rewards.copy()
        rewards[tokens.starts + tokens.lengths - 1] += tokens.rewards
        advantages = generalized_advantages(
            rewards, values, tokens.lengths, self.discount, self.trace_decay
        )
        returns = advantages + values
        spread = returns.var()
        explained = 1 - (returns - values).var() / spread if spread else 0.0
        metrics = {"value_mean": values.mean(), "explained_variance": explained}
        return Estimate(whitened(advantages) if self.normalize else advantages, returns, metrics)


@dataclass(frozen=True)
class TeacherGap:
    """On-policy distillation: the log-ratio of teacher and student as every token's advantage.

    ``A_t = log pi_teacher - log pi_student`` is minus the single-sample estimate of the reverse KL
    (Lu and Thinking Machines Lab 2025, "On-Policy Distillation"; Agarwal et al. 2024, arXiv
    2306.13649). The student is the behaviour policy; the samples' rewards are not used.
    """

    passes: ClassVar[frozenset[Pass]] = frozenset({"teacher"})

    def __call__(self, tokens: BatchTokens, token_rewards: Floats) -> Estimate:
        """Return for every token the teacher's log-probability less the student's."""
        assert tokens.teacher_logprobs is not None, "the teacher's log-probabilities come first"
        gap = tokens.teacher_logprobs.astype(np.float64) - tokens.behaviour_logprobs
        return Estimate(gap + token_rewards, metrics={"teacher_reverse_kl": -gap.mean()})


@dataclass(frozen=True)
class PreferredPair:
    """DPO as a weighted likelihood: of a pair, the preferred sample up, the other one down.

    Rafailov et al. 2023 (arXiv 2305.18290, eq. 7): the gradient of
    ``-log sigmoid(m)``, ``m = beta ((s_w - ref_w) - (s_l - ref_l))`` with sums s of a sample's
    log-probabilities, is ``-beta sigmoid(-m) grad (s_w - s_l)``. So ``+-beta sigmoid(-m)`` as the
    advantage of a plain policy gradient, summed over tokens, is its exact gradient however the
    pairs are split into microbatches. Of each group the sample with the higher reward is preferred.
    """

    beta: float = 0.1
    passes: ClassVar[frozenset[Pass]] = frozenset({"proximal", "reference"})

    def __call__(self, tokens: BatchTokens, token_rewards: Floats) -> Estimate:
        """Return advantages; the metric ``preference_loss`` is the value of DPO's objective."""
        assert tokens.proximal_logprobs is not None, "log-probabilities come first"
        assert tokens.reference_logprobs is not None, "the reference's come first"
        assert (np.bincount(tokens.groups) == 2).all(), "preferences are pairs"
        moved = tokens.proximal_logprobs.astype(np.float64) - tokens.reference_logprobs
        sums = tokens.sums(moved)
        sign = np.sign(centred_in_group(tokens, tokens.rewards))
        margins = self.beta * np.bincount(tokens.groups, weights=sign * sums)
        losses = np.logaddexp(0, -margins)
        pull = self.beta * np.exp(-np.logaddexp(0, margins))  # beta sigmoid(-margin)
        metrics = {
            "preference_loss": losses.mean(),
            "preference_accuracy": (margins > 0).mean(),
            "preference_margin": margins.mean(),
        }
        return Estimate(tokens.of_tokens(sign * pull[tokens.groups]), metrics=metrics)


def outcomes(tokens: BatchTokens, token_rewards: Floats) -> Floats:
    """Return the total reward of each sample, float64 [n]: its own and those of its tokens."""
    return tokens.rewards + tokens.sums(token_rewards)


def centred_in_group(tokens: BatchTokens, of_samples: Floats) -> Floats:
    """Return values [n] less their group's mean; exactly zero where a group's are all equal."""
    counts = np.bincount(tokens.groups)
    first = np.zeros(len(counts))
    first[tokens.groups[::-1]] = of_samples[::-1]
    # against a sibling first: the mean of equal numbers need not be that number
    relative = of_samples - first[tokens.groups]
    means = np.bincount(tokens.groups, weights=relative) / np.maximum(counts, 1)
    return relative - means[tokens.groups]


def sums_from_here(tokens: BatchTokens, of_tokens: Floats) -> Floats:
    """Return for every token the sum over it and those after it in its sample, [N]."""
    before = np.cumsum(of_tokens) - of_tokens
    totals = tokens.sums(of_tokens)
    return tokens.of_tokens(totals + before[tokens.starts]) - before


def whitened(values: Floats, epsilon: float = 1e-8) -> Floats:
    """Return values with mean 0 and standard deviation 1; zeros where they are all equal."""
    centred = values - values.mean()
    return centred / (values.std() + epsilon)


def generalized_advantages(
    rewards: Floats, values: Floats, lengths: NDArray[np.int64], discount: float, trace_decay: float
) -> Floats:
    """Return GAE, float64 [N], of samples one after the other; ``rewards``, ``values`` [N]."""
    inside = np.arange(lengths.max()) < lengths[:, None]
    rewards_nT, values_nT, found_nT = (np.zeros(inside.shape) for _ in range(3))
    rewards_nT[inside], values_nT[inside] = rewards, values
    advantage, next_value = np.zeros(len(lengths)), np.zeros(len(lengths))
    for t in reversed(range(inside.shape[1])):
        td_error = rewards_nT[:, t] + discount * next_value - values_nT[:, t]
        # beyond a sample's end rewards and values are zero, and so is its advantage
        advantage = td_error + discount * trace_decay * advantage
        found_nT[:, t], next_value = advantage, values_nT[:, t]
    return found_nT[inside]
