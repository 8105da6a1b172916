"""What is optimised: advantages and policy loss."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from paceline.configs.schema.base import Section


class GRPOConfig(Section):
    """Group-relative advantages with a clipped, token-mean policy loss.

    Shao et al. 2024 (arXiv 2402.03300) eq. 3; asymmetric clipping and the token mean are DAPO's
    (Yu et al. 2025, arXiv 2503.14476, eq. 8-12).
    """

    type: Literal["grpo"] = "grpo"
    normalize_std: bool = True
    """Divide centred rewards by the group's standard deviation (false: Dr.GRPO's advantage)."""

    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """Ratios under 1 - clip_low stop lowering the loss."""

    clip_high: float = Field(default=0.28, ge=0)
    """Ratios over 1 + clip_high stop lowering the loss."""

    zero_signal: Literal["drop", "keep"] = "drop"
    """Groups whose rewards are all equal carry no gradient: drop them and take another group, or
    train on them all the same."""

    max_draws: int = Field(default=8, ge=1)
    """With `drop`: a step looks at this many times its groups before it trains on fewer."""


class SFTConfig(Section):
    """Token-mean negative log-likelihood of demonstrations."""

    type: Literal["sft"] = "sft"


AlgorithmConfig = GRPOConfig


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
