"""Checks before a run that a model can be divided as ``learner`` asks.

What the learner divides is written down here once, for the check and for the learner itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.configs.errors import ConfigError
from paceline.configs.forecast.model_shape import ModelShape, model_keys, model_shape
from paceline.configs.schema.learner import LearnerConfig, ParallelConfig
from paceline.configs.schema.run import RunConfig

TENSOR_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures (``model_type``) that `learner/engines/parallel/tensor.py` has a plan for."""
CHUNKED_FAMILIES = ("llama", "qwen2", "qwen3")
"""Architectures whose layers are a norm, ``self_attn``, a norm and an MLP, where only attention
mixes tokens: `learner/model/chunked_layers.py` knows them."""
EXPERT_FAMILIES = ("qwen3_moe",)
"""Architectures whose experts and routers `learner/model/experts.py` knows."""


def require_divisible(config: RunConfig) -> None:
    """Refuse what the learner would refuse once it has loaded the model.

    Of an architecture by another name than those above, pipeline and sequence ranks are tried when
    it is loaded; of a hub name, nothing is known here.

    Raises:
        ConfigError: the learner has no plan for the architecture, or heads, layers or the
            vocabulary cannot be divided by the mesh.
    """
    keys, learner = model_keys(config.model), config.learner
    problem = _unplanned(str(keys["model_type"]), learner) if "model_type" in keys else None
    problem = problem or _undivided(keys, model_shape(config.model), learner.parallel)
    if problem is not None:
        raise ConfigError(problem)


def divided_experts(model_type: str, learner: LearnerConfig) -> str | None:
    """Return why experts cannot be divided as asked, in one line, or None: only FSDP shards
    them."""
    is_whole = learner.engine == "fsdp" and learner.parallel.model_ranks == 1
    if is_whole or model_type not in EXPERT_FAMILIES:
        return None
    return (
        f"{model_type} has experts, which tensor, pipeline and sequence ranks and DeepSpeed do "
        "not divide: set learner.engine fsdp and leave learner.parallel at its defaults but for "
        "replicate, or use a model without experts"
    )


def unknown_to_tensor(model_type: str, num_ranks: int) -> str | None:
    """Return what tensor ranks lack for an architecture, in one line; None for nothing."""
    if num_ranks == 1 or model_type in TENSOR_FAMILIES:
        return None
    return (
        f"learner.parallel.tensor ({num_ranks}) does not know {model_type}: it divides "
        f"{', '.join(TENSOR_FAMILIES)}, and another architecture needs a plan in "
        "learner/engines/parallel/tensor.py that says how each of its parameters is divided; set "
        "tensor to 1"
    )


def unknown_to_chunks(model_type: str) -> str | None:
    """Return what chunked layers lack for an architecture, in one line; None for nothing."""
    if model_type in CHUNKED_FAMILIES:
        return None
    return (
        "learner.activation_checkpointing chunks knows the layers of "
        f"{', '.join(CHUNKED_FAMILIES)}, not of {model_type}, which needs to be written down in "
        "learner/model/chunked_layers.py: use layers"
    )


def undivided_by_tensor(
    num_ranks: int, heads: int, key_value_heads: int, intermediate: int, vocabulary: int
) -> str | None:
    """Return what of a model ``num_ranks`` tensor ranks do not divide, in one line, or None."""
    for name, count in (
        ("attention heads", heads),
        ("key-value heads", key_value_heads),
        ("intermediate features", intermediate),
        ("vocabulary entries", vocabulary),
    ):
        if count % num_ranks:
            return (
                f"learner.parallel.tensor ({num_ranks}) does not divide the model's {count} "
                f"{name}: choose a divisor"
            )
    return None


def undivided_by_sequence(num_ranks: int, num_tensor_ranks: int, heads: int) -> str | None:
    """Return why sequence ranks cannot divide the heads of a tensor rank, in one line, or None."""
    if heads % (num_tensor_ranks * num_ranks) == 0:
        return None
    return (
        f"learner.parallel.sequence ({num_ranks}) does not divide the {heads // num_tensor_ranks} "
        f"attention heads of a tensor rank ({heads} / {num_tensor_ranks}): inside attention "
        "sequence ranks divide heads; choose a divisor"
    )


def undivided_by_pipeline(num_ranks: int, stages_per_rank: int, layers: int) -> str | None:
    """Return why not every stage of a pipeline gets a layer, in one line, or None."""
    num_stages = num_ranks * stages_per_rank
    if num_stages <= layers:
        return None
    return (
        f"learner.parallel has {num_stages} pipeline stages ({num_ranks} ranks with "
        f"{stages_per_rank} each) for a model of {layers} layers: a stage needs a layer; lower "
        "pipeline or stages_per_rank"
    )


def _unplanned(model_type: str, learner: LearnerConfig) -> str | None:
    chunks = learner.activation_checkpointing == "chunks"
    return (
        divided_experts(model_type, learner)
        or unknown_to_tensor(model_type, learner.parallel.tensor)
        or (unknown_to_chunks(model_type) if chunks else None)
    )


def _undivided(
    keys: Mapping[str, Any], shape: ModelShape | None, parallel: ParallelConfig
) -> str | None:
    """Check the model's sizes, where known: heads and layers have one name everywhere."""
    problem = None
    heads, layers = keys.get("num_attention_heads"), keys.get("num_hidden_layers")
    if shape is not None:
        heads, layers = shape.query_heads, shape.layers
        problem = undivided_by_tensor(
            parallel.tensor, heads, shape.key_value_heads, shape.intermediate, shape.vocabulary
        )
    if problem is None and parallel.sequence > 1 and isinstance(heads, int):
        problem = undivided_by_sequence(parallel.sequence, parallel.tensor, heads)
    if problem is None and isinstance(layers, int):
        problem = undivided_by_pipeline(parallel.pipeline, parallel.stages_per_rank, layers)
    return problem
