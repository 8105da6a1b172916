"""Mixtures of experts: layers in which a router chooses, for each token, a few of many MLPs."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from paceline.configs.errors import ModelError
from paceline.configs.schema.learner import LearnerConfig

FAMILIES = ("qwen3_moe",)
"""Architectures whose experts and routers are known."""


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether the model is of an architecture with experts that are known here."""
    return config.model_type in FAMILIES


def require_whole_experts(config: PreTrainedConfig, learner: LearnerConfig) -> None:
    """Refuse to divide a model with experts in other ways than FSDP and over samples.

    Raises:
        ModelError: ``learner`` asks for it.
    """
    if not has_experts(config):
        return
    if learner.engine != "fsdp" or learner.parallel.model_ranks > 1:
        raise ModelError(
            f"{config.model_type} has experts, which tensor, pipeline and sequence ranks and "
            "DeepSpeed do not divide: set learner.engine fsdp and leave learner.parallel at its "
            "defaults but for replicate, or use a model without experts"
        )


def parameters_per_token(model: PreTrainedModel) -> int:
    """Parameters that a token is multiplied with: of experts those it is sent to."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if not has_experts(model.config):
        return total
    named = model.named_parameters()
    in_experts = sum(parameter.numel() for name, parameter in named if ".mlp.experts." in name)
    used = in_experts * model.config.num_experts_per_tok // model.config.num_experts
    return total - in_experts + used
