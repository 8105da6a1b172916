"""What is optimised: an algorithm is a choice of orthogonal parts, and its name is their defaults.

``PRESETS`` is the whole difference between the named algorithms. Whatever a configuration says
beside ``type`` is laid over the preset, part by part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from paceline.configs.schema.base import Section, overlaid
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
    """What a nat of divergence costs; 0 only measures it."""

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
    """Of a separate critic; absent: as `learner.optimizer`."""


class OverlongConfig(Section):
    """DAPO's soft punishment of completions near the token limit (arXiv 2503.14476, eq. 13)."""

    buffer_tokens: int = Field(ge=1)
    """The penalty grows over this many tokens before `rollout.sampling.max_tokens`."""

    penalty: float = Field(default=1.0, gt=0)
    """What a completion at the limit loses."""


BY_TYPE: dict[str, JsonValue] = {"default_by": "type"}
"""Marks keys whose default the preset gives."""


class PolicyAlgorithm(Section):
    """Reinforcement learning on groups of samples; `type` names a choice of the parts below."""

    type: Literal[
        "grpo",
        "dr_grpo",
        "dapo",
        "rloo",
        "reinforce_plus_plus",
        "reinforce",
        "gspo",
        "cispo",
        "aipo",
        "ppo",
        "decoupled_ppo",
        "distillation",
    ] = "grpo"
    """The algorithm; everything beside it is laid over its choices (docs/algorithms.md)."""

    advantage: AdvantageConfig = Field(json_schema_extra=BY_TYPE)
    """How much better than expected a sample or token was."""

    loss: PolicyLossConfig = Field(json_schema_extra=BY_TYPE)
    """How the advantage moves a token's probability."""

    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = Field(
        json_schema_extra=BY_TYPE
    )
    """Average over all tokens; over each sample, then over samples; or over samples of the length
    `rollout.sampling.max_tokens`."""

    old_policy: Literal["behaviour", "recomputed", "interpolated"] = "behaviour"
    """What the ratio is relative to: the policy that sampled; the weights at the start of the step
    (decoupled PPO, arXiv 2505.24298); or an interpolation by age (A-3PO, arXiv 2512.06547)."""

    corrections: tuple[CorrectionConfig, ...] = ()
    """Weights and masks of off-policy tokens, multiplied."""

    reference: ReferenceConfig | None = None
    """Penalty for leaving a reference policy."""

    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""

    overlong: OverlongConfig | None = None
    """Penalty of overlong completions."""

    critic: CriticConfig | None = None
    """The critic, where the advantage needs one."""

    num_updates: int = Field(default=1, ge=1)
    """Optimiser updates a step: its groups are divided evenly among them."""

    zero_signal: Literal["drop", "keep"] = "drop"
    """Groups whose rewards are all equal carry no gradient: drop them and take another group, or
    train on them all the same."""

    max_draws: int = Field(default=8, ge=1)
    """With `drop`: a step looks at this many times its groups before it trains on fewer."""

    @model_validator(mode="before")
    @classmethod
    def _lay_over_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        preset = PRESETS.get(given.get("type", "grpo"), {})
        return overlaid(preset, given)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.old_policy == "behaviour":
            for correction in self.corrections:
                if correction.type in WEIGHTING and self.loss.type != "reinforce":
                    raise ValueError(
                        f"algorithm.corrections: {correction.type} weighs tokens by their ratio to "
                        f"the behaviour policy, and so does the loss {self.loss.type} with "
                        "old_policy behaviour: set old_policy to recomputed, or leave it out"
                    )
        if (self.advantage.type == "gae") != (self.critic is not None):
            raise ValueError(
                f"algorithm.critic is {'missing' if self.critic is None else 'given'} but "
                f"algorithm.advantage.type is {self.advantage.type}: a critic goes with gae"
            )
        if self.reference and self.reference.place == "loss" and self.reference.estimator == "k1":
            raise ValueError(
                "algorithm.reference.estimator k1 has no gradient in the loss: "
                "use k2 or k3 there, or set place to reward"
            )
        return self


WEIGHTING = ("truncate", "mask_above", "mask_outside")
"""Corrections that multiply by the importance weight itself."""

_GROUP_RELATIVE = {"type": "group_relative"}
_ASYMMETRIC_CLIP = {"type": "clip", "clip_low": 0.2, "clip_high": 0.28}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {
        "advantage": _GROUP_RELATIVE,
        "loss": {"type": "clip"},
        "aggregation": "sequence_mean",
    },
    "dr_grpo": {
        "advantage": {"type": "group_relative", "normalize_std": False},
        "loss": {"type": "clip"},
        "aggregation": "fixed_length",
    },
    "dapo": {
        "advantage": _GROUP_RELATIVE,
        "loss": _ASYMMETRIC_CLIP,
        "aggregation": "token_mean",
    },
    "rloo": {
        "advantage": {"type": "leave_one_out"},
        "loss": {"type": "clip"},
        "aggregation": "token_mean",
    },
    "reinforce_plus_plus": {
        "advantage": {"type": "batch_normalized"},
        "loss": {"type": "clip"},
        "aggregation": "token_mean",
        "zero_signal": "keep",
    },
    "reinforce": {
        "advantage": _GROUP_RELATIVE,
        "loss": {"type": "reinforce"},
        "aggregation": "token_mean",
    },
    "gspo": {
        "advantage": _GROUP_RELATIVE,
        "loss": {"type": "sequence_clip"},
        "aggregation": "sequence_mean",
    },
    "cispo": {
        "advantage": _GROUP_RELATIVE,
        "loss": {"type": "clipped_weight", "low": 0.0, "high": 1.28},
        "aggregation": "token_mean",
    },
    "aipo": {
        "advantage": _GROUP_RELATIVE,
        "loss": {"type": "clipped_weight", "low": 0.0, "high": 2.0},
        "aggregation": "token_mean",
    },
    "ppo": {
        "advantage": {"type": "gae"},
        "loss": {"type": "clip"},
        "aggregation": "token_mean",
        "critic": {},
        "zero_signal": "keep",
    },
    "decoupled_ppo": {
        "advantage": _GROUP_RELATIVE,
        "loss": {"type": "clip"},
        "aggregation": "token_mean",
        "old_policy": "recomputed",
        "corrections": ({"type": "truncate", "cap": 5.0},),
    },
    "distillation": {
        "advantage": {"type": "teacher_gap"},
        "loss": {"type": "clip"},
        "aggregation": "token_mean",
        "zero_signal": "keep",
    },
}
"""The named algorithms, as choices of parts."""


class PreferenceAlgorithm(Section):
    """Learn from pairs of completions which is better (DPO, arXiv 2305.18290), without sampling."""

    type: Literal["dpo"]
    beta: float = Field(default=0.1, gt=0)
    """How closely to stay to the reference: what a nat of the pair's margin counts."""

    reference: FrozenPolicyConfig = FrozenPolicyConfig()
    """The policy that margins are relative to."""


class SupervisedAlgorithm(Section):
    """Learn demonstrations by heart: the mean negative log-likelihood of their tokens."""

    type: Literal["sft"]


class ImportedAlgorithm(Section):
    """Somebody else's algorithm."""

    type: Literal["import"]
    import_path: str
    """`package.module:name` of what builds an `Algorithm` (`learner/objective.py`)."""

    parameters: dict[str, Any] = {}
    """Keyword arguments it is called with."""

    critic: CriticConfig | None = None
    """The critic, where it needs `values`."""

    reference: FrozenPolicyConfig | None = None
    """The frozen policy, where it needs one."""

    zero_signal: Literal["drop", "keep"] = "drop"
    """What happens to groups whose rewards are all equal."""

    max_draws: int = Field(default=8, ge=1)
    """With `drop`: a step looks at this many times its groups before it trains on fewer."""


AlgorithmConfig = Annotated[
    PolicyAlgorithm | PreferenceAlgorithm | SupervisedAlgorithm | ImportedAlgorithm,
    Field(discriminator="type"),
]


def critic_of(algorithm: AlgorithmConfig) -> CriticConfig | None:
    """The critic that an algorithm asks for."""
    return algorithm.critic if isinstance(algorithm, PolicyAlgorithm | ImportedAlgorithm) else None


def reference_of(algorithm: AlgorithmConfig) -> FrozenPolicyConfig | None:
    """The frozen policy that an algorithm asks for."""
    return None if isinstance(algorithm, SupervisedAlgorithm) else algorithm.reference


class WarmStartConfig(Section):
    """Supervised steps before reinforcement learning, on the same loop and the same learner."""

    max_steps: int = Field(default=400, ge=1)
    """Ends here with an error when `target_accuracy` was not reached."""

    batch_size: int = Field(default=64, ge=1)
    """Demonstrations a step."""

    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""

    warmup_steps: int = Field(default=30, ge=0)
    """Steps of linear warm-up."""

    target_accuracy: float = Field(default=0.4, gt=0, lt=1)
    """Stop as soon as greedy accuracy on the validation prompts reaches this: an undertrained,
    high-entropy start leaves reinforcement learning something to climb."""

    evaluate_every: int = Field(default=10, ge=1)
    """Steps between validations."""

    num_validation: int = Field(default=128, ge=1)
    """Validation prompts, distinct from the held-out ones."""

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.evaluate_every > self.max_steps:
            raise ValueError(
                f"warm_start.evaluate_every ({self.evaluate_every}) exceeds warm_start.max_steps "
                f"({self.max_steps}): it would never validate; lower it"
            )
        return self
