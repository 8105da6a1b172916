"""The parts that algorithms are choices of: advantages, losses, corrections and the rest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from paceline.configs.schema.base import Section
from paceline.configs.schema.learner import OptimizerConfig


class GroupRelativeAdvantage(Section):
    """Reward less the group's mean (GRPO, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783)."""

    type: Literal["group_relative"] = "group_relative"
    normalize_std: bool = True
    """Divide by the group's standard deviation; false is Dr.GRPO's."""


class LeaveOneOutAdvantage(Section):
    """Reward less the mean of its siblings (RLOO, arXiv 2402.14740)."""

    type: Literal["leave_one_out"] = "leave_one_out"


class BatchNormalizedAdvantage(Section):
    """Reward normalised over the whole batch (REINFORCE++, arXiv 2501.03262)."""

    type: Literal["batch_normalized"] = "batch_normalized"
    baseline: Literal["none", "group"] = "none"
    """Subtract the group's mean first (REINFORCE++-baseline)."""


class OutcomeAdvantage(Section):
    """The reward itself, without a baseline."""

    type: Literal["outcome"] = "outcome"


class GeneralizedAdvantageConfig(Section):
    """GAE with a critic (arXiv 1506.02438)."""

    type: Literal["gae"] = "gae"
    discount: float = Field(default=1.0, gt=0, le=1)
    """gamma: what a reward one token later is worth."""

    trace_decay: float = Field(default=1.0, ge=0, le=1)
    """lambda: 1 trusts outcomes alone, 0 the critic alone."""

    normalize: bool = True
    """Whiten advantages over the batch."""


class TeacherGapAdvantage(Section):
    """A teacher's log-probability less the student's, of every token (arXiv 2306.13649)."""

    type: Literal["teacher_gap"] = "teacher_gap"


AdvantageConfig = Annotated[
    GroupRelativeAdvantage
    | LeaveOneOutAdvantage
    | BatchNormalizedAdvantage
    | OutcomeAdvantage
    | GeneralizedAdvantageConfig
    | TeacherGapAdvantage,
    Field(discriminator="type"),
]


class ClipLoss(Section):
    """PPO's clipped surrogate (arXiv 1707.06347), with a bound on either side (DAPO)."""

    type: Literal["clip"] = "clip"
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """Ratios under 1 - clip_low stop lowering the loss."""

    clip_high: float = Field(default=0.2, ge=0)
    """Ratios over 1 + clip_high stop lowering the loss."""

    dual_clip: float | None = Field(default=None, gt=1)
    """A bad token costs at most this many times its advantage (arXiv 1912.09729)."""


class SequenceClipLoss(Section):
    """The clipped surrogate by the ratio of whole sequences (GSPO, arXiv 2507.18071)."""

    type: Literal["sequence_clip"] = "sequence_clip"
    clip_low: float = Field(default=3e-4, ge=0, lt=1)
    """Ratios under 1 - clip_low stop lowering the loss."""

    clip_high: float = Field(default=4e-4, ge=0)
    """Ratios over 1 + clip_high stop lowering the loss."""

    length_normalized: bool = True
    """Take the ratio's root by the sample's length (GSPO); false: the ratio itself."""


class ClippedWeightLoss(Section):
    """REINFORCE with a bounded importance weight (CISPO, arXiv 2506.13585; AIPO, 2505.24034)."""

    type: Literal["clipped_weight"] = "clipped_weight"
    low: float = Field(default=0.0, ge=0)
    """Smallest weight."""

    high: float = Field(default=2.0, gt=0)
    """Largest weight: 1 + epsilon_high of CISPO, rho of AIPO."""


class ReinforceLoss(Section):
    """The plain policy gradient, which takes every sample for on-policy."""

    type: Literal["reinforce"] = "reinforce"


PolicyLossConfig = Annotated[
    ClipLoss | SequenceClipLoss | ClippedWeightLoss | ReinforceLoss, Field(discriminator="type")
]


class TruncateCorrection(Section):
    """TIS: importance weights up to a cap."""

    type: Literal["truncate"] = "truncate"
    cap: float = Field(default=2.0, gt=0)
    """Largest weight."""

    level: Literal["token", "sequence"] = "token"
    """Weight of a token, or the product over its sample."""


class MaskAboveCorrection(Section):
    """MIS: importance weights, zero above a cap."""

    type: Literal["mask_above"] = "mask_above"
    cap: float = Field(default=2.0, gt=0)
    """Largest weight that is trained."""

    level: Literal["token", "sequence"] = "token"
    """Weight of a token, or the product over its sample."""


class MaskOutsideCorrection(Section):
    """IcePop: importance weights, zero outside a range (arXiv 2510.18855)."""

    type: Literal["mask_outside"] = "mask_outside"
    low: float = Field(default=0.5, gt=0)
    """Smallest weight that is trained."""

    high: float = Field(default=5.0, gt=0)
    """Largest weight that is trained."""


class RejectSequencesCorrection(Section):
    """Whole samples are left out whose geometric mean weight lies outside a range."""

    type: Literal["reject_sequences"] = "reject_sequences"
    low: float = Field(default=0.999, gt=0)
    """Smallest mean."""

    high: float = Field(default=1.001, gt=0)
    """Largest mean."""


class SecondMomentCorrection(Section):
    """M2PO: the tokens that moved furthest are left out (arXiv 2510.01161)."""

    type: Literal["second_moment"] = "second_moment"
    threshold: float = Field(default=0.04, gt=0)
    """Largest mean square of the log-ratio, in nats squared."""


class MaskMasteredCorrection(Section):
    """UloRL: tokens of good samples that the policy is sure of are left out (arXiv 2507.19766)."""

    type: Literal["mask_mastered"] = "mask_mastered"
    probability: float = Field(default=0.99, gt=0, lt=1)
    """Tokens at least this likely are mastered."""

    entropy: float = Field(default=0.2, gt=0)
    """Only in samples of less mean entropy than this, in nats."""


CorrectionConfig = Annotated[
    TruncateCorrection
    | MaskAboveCorrection
    | MaskOutsideCorrection
    | RejectSequencesCorrection
    | SecondMomentCorrection
    | MaskMasteredCorrection,
    Field(discriminator="type"),
]


class FrozenPolicyConfig(Section):
    """A policy that is kept as it is, beside the one that learns."""

    path: str | None = None
    """Folder in Hugging Face format; absent: the policy as it is when training begins."""

    offload: bool = False
    """Keep it in host memory while it is not used; for learners on GPUs."""


class ReferenceConfig(FrozenPolicyConfig):
    """A frozen policy that training is not to leave far behind."""

    coefficient: float = Field(default=0.001, ge=0)
    """Cost of a nat of divergence; 0 only measures it."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators of KL(policy || reference). In the loss, k1 has no gradient in
    expectation: use k2 or k3 there."""

    place: Literal["loss", "reward"] = "loss"
    """Add it to the loss, or take it off the reward."""


class CriticConfig(Section):
    """A critic, for advantages of type `gae`."""

    backbone: Literal["separate", "shared"] = "separate"
    """A model of its own with an optimiser of its own, begun from the policy's weights; or a value
    head on the policy."""

    coefficient: float = Field(default=0.5, gt=0)
    """Weight of the value loss; with a shared backbone it competes with the policy's."""

    clip: float | None = Field(default=0.2, gt=0)
    """A value may move this far from the one before the step; null does not bound it."""

    optimizer: OptimizerConfig | None = None
    """Optimiser of a separate critic; absent: as `learner.optimizer`."""


class OverlongConfig(Section):
    """DAPO's soft punishment of completions near the token limit (arXiv 2503.14476, eq. 13)."""

    buffer_tokens: int = Field(ge=1)
    """The penalty grows over this many tokens before `rollout.sampling.max_tokens`."""

    penalty: float = Field(default=1.0, gt=0)
    """Reward that a completion at the limit loses."""
