"""Algorithms: each is a choice of orthogonal parts, and its name stands for their defaults.

``PRESETS`` is the whole difference between the named algorithms. Whatever a configuration says
beside ``type`` is laid over the preset, part by part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from paceline.configs.schema.algorithm_parts import (
    AdvantageConfig,
    CorrectionConfig,
    CriticConfig,
    FrozenPolicyConfig,
    OverlongConfig,
    PolicyLossConfig,
    ReferenceConfig,
)
from paceline.configs.schema.base import Section, overlaid

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
    """Denominator of the ratio: the policy that sampled; the weights at the start of the step
    (decoupled PPO, arXiv 2505.24298); or an interpolation by age (A-3PO, arXiv 2512.06547)."""

    corrections: tuple[CorrectionConfig, ...] = ()
    """Weights and masks of off-policy tokens, multiplied; each type once."""

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
    train on them anyway."""

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
        types = Counter(correction.type for correction in self.corrections)
        for kind, count in types.items():
            if count > 1:
                raise ValueError(
                    f"algorithm.corrections: {kind} is given {count} times; give each type once"
                )
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
    """Preference optimisation on pairs of completions (DPO, arXiv 2305.18290), without sampling."""

    type: Literal["dpo"]
    beta: float = Field(default=0.1, gt=0)
    """How closely to stay to the reference: what a nat of the pair's margin counts."""

    reference: FrozenPolicyConfig = FrozenPolicyConfig()
    """The policy that margins are relative to."""


class SupervisedAlgorithm(Section):
    """Supervised fine-tuning: the mean negative log-likelihood of the demonstrations' tokens."""

    type: Literal["sft"]


class ImportedAlgorithm(Section):
    """An algorithm of your own, imported by name."""

    type: Literal["import"]
    import_path: str
    """`package.module:name` of what builds an `Algorithm` (`learner/objective/objective.py`)."""

    parameters: dict[str, Any] = {}
    """Keyword arguments it is called with."""

    critic: CriticConfig | None = None
    """The critic, where it needs `values`."""

    reference: FrozenPolicyConfig | None = None
    """The frozen policy, where it needs one."""

    zero_signal: Literal["drop", "keep"] = "drop"
    """Treatment of groups whose rewards are all equal."""

    max_draws: int = Field(default=8, ge=1)
    """With `drop`: a step looks at this many times its groups before it trains on fewer."""


AlgorithmConfig = Annotated[
    PolicyAlgorithm | PreferenceAlgorithm | SupervisedAlgorithm | ImportedAlgorithm,
    Field(discriminator="type"),
]


def critic_of(algorithm: AlgorithmConfig) -> CriticConfig | None:
    """Return the critic that an algorithm asks for."""
    return algorithm.critic if isinstance(algorithm, PolicyAlgorithm | ImportedAlgorithm) else None


def reference_of(algorithm: AlgorithmConfig) -> FrozenPolicyConfig | None:
    """Return the frozen policy that an algorithm asks for."""
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
