"""The learner ranks and their optimiser."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from paceline.configs.schema.base import Section


class OptimizerConfig(Section):
    """AdamW with warm-up and decay."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""

    warmup_steps: int = Field(default=10, ge=0)
    """Steps of linear warm-up from 0."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up, over the planned number of steps."""

    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step, as a fraction of the peak."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""

    epsilon: float = Field(default=1e-8, gt=0)
    """Adam's denominator offset."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global 2-norm."""

    @model_validator(mode="after")
    def _betas_in_range(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must lie in [0, 1), got {self.betas}")
        return self


class LearnerConfig(Section):
    """FSDP2 ranks that share one model."""

    num_ranks: int = Field(default=1, ge=1)
    """Data-parallel ranks; parameters, gradients and optimiser state are sharded over them."""

    gpus_per_rank: float = Field(default=0, ge=0)
    """GPUs Ray reserves for a rank; 0 runs it on the CPU with gloo."""

    cpus_per_rank: float = Field(default=0, ge=0)
    """CPUs Ray reserves for a rank; 0 lets ranks share a small machine."""

    tokens_per_microbatch: int = Field(default=4096, ge=1)
    """Upper bound of packed tokens in one forward and backward pass on a rank."""

    activation_checkpointing: bool = False
    """Recompute layer activations in the backward pass."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser."""

    collective_timeout_seconds: float = Field(default=120.0, gt=0)
    """A collective that takes longer ends the run instead of hanging it."""
