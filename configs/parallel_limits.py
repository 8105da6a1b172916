"""Whether a model can be divided as ``learner.parallel`` asks, before anything is started."""

from __future__ import annotations

from paceline.configs.errors import ConfigError
from paceline.configs.model_shape import ModelShape, model_shape
from paceline.configs.schema.learner import LearnerConfig, ParallelConfig
from paceline.configs.schema.run import RunConfig


def require_divisible(config: RunConfig) -> None:
    """Refuse a mesh that does not divide the model; of a model whose sizes are not known (a hub
    name, another architecture) the learner decides when it loads it.

    Raises:
        ConfigError: heads, layers or the vocabulary cannot be divided by the mesh.
    """
    parallel = config.learner.parallel
    shape = model_shape(config.model)
    if shape is None:
        return
    for problem in (
        _experts(shape, config.learner),
        _matrices(shape, parallel),
        _sequences(shape, parallel),
        _layers(shape, parallel),
    ):
        if problem is not None:
            raise ConfigError(problem)


def _experts(shape: ModelShape, learner: LearnerConfig) -> str | None:
    if shape.experts is None or (learner.engine == "fsdp" and learner.parallel.model_ranks == 1):
        return None
    return (
        "the model has experts, which tensor, pipeline and sequence ranks and DeepSpeed do not "
        "divide: set learner.engine fsdp and leave learner.parallel at its defaults but for "
        "replicate"
    )


def undivided_by_tensor(
    num_ranks: int, heads: int, key_value_heads: int, intermediate: int, vocabulary: int
) -> str | None:
    """What of a model ``num_ranks`` tensor ranks do not divide, in one line; None for nothing."""
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


def _matrices(shape: ModelShape, parallel: ParallelConfig) -> str | None:
    return undivided_by_tensor(
        parallel.tensor,
        shape.query_heads,
        shape.key_value_heads,
        shape.intermediate,
        shape.vocabulary,
    )


def _sequences(shape: ModelShape, parallel: ParallelConfig) -> str | None:
    of_a_rank = shape.query_heads // parallel.tensor
    if of_a_rank % parallel.sequence:
        return (
            f"learner.parallel.sequence ({parallel.sequence}) does not divide the {of_a_rank} "
            f"attention heads of a tensor rank ({shape.query_heads} / {parallel.tensor}): inside "
            "attention sequence ranks divide heads; choose a divisor"
        )
    return None


def _layers(shape: ModelShape, parallel: ParallelConfig) -> str | None:
    num_stages = parallel.pipeline * parallel.stages_per_rank
    if num_stages > shape.layers:
        return (
            f"learner.parallel has {num_stages} pipeline stages ({parallel.pipeline} ranks with "
            f"{parallel.stages_per_rank} each) for a model of {shape.layers} layers: a stage needs "
            "a layer; lower pipeline or stages_per_rank"
        )
    return None
