"""What a run will need, before anything is started: actors, CPUs, GPUs and memory.

Memory figures are estimates to catch a run that cannot fit, not measurements: allocator slack,
fragmentation and communication buffers are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.configs.model_shape import ModelShape, model_shape
from paceline.configs.schema import RunConfig
from paceline.configs.schema.algorithm import critic_of, reference_of
from paceline.configs.schema.rollout import RolloutConfig
from paceline.configs.schema.teacher import TeacherConfig

_MIB = 1024**2
_BYTES = {"float32": 4, "bfloat16": 2}
# Measured on CPU: interpreter, torch and Ray of a rank; interpreter and vLLM of an engine.
_LEARNER_BASE = 500 * _MIB
_ENGINE_BASE = 512 * _MIB


@dataclass(frozen=True)
class Placement:
    """Actors of a run and what Ray reserves for all of them together."""

    num_rollout_workers: int
    num_learner_ranks: int
    num_grader_processes: int
    num_teacher_workers: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what takes them; ``parts`` sum to ``total``."""

    parts: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(size for _, size in self.parts)


@dataclass(frozen=True)
class Estimate:
    """What `paceline check` tells; memory and parameters are None where the shape is unknown.

    ``engine_sequences`` is how many sequences of full length the KV cache of a CPU engine holds;
    None for GPU engines, whose cache is what `gpu_memory_utilization` leaves.
    """

    placement: Placement
    num_parameters: int | None
    learner_rank: MemoryEstimate | None
    engine: MemoryEstimate | None
    engine_sequences: int | None


def estimate(config: RunConfig) -> Estimate:
    """Estimate placement and memory from the configuration alone."""
    shape = model_shape(config.model)
    if shape is None:
        return Estimate(placement(config), None, None, None, None)
    return Estimate(
        placement=placement(config),
        num_parameters=shape.num_parameters,
        learner_rank=_learner_rank(config, shape),
        engine=_engine(config, shape),
        engine_sequences=_engine_sequences(config, shape),
    )


def placement(config: RunConfig) -> Placement:
    """Count the actors and sum what Ray reserves for them."""
    rollout, learner, teacher = config.rollout, config.learner, config.teacher
    engines: list[RolloutConfig | TeacherConfig] = [rollout]
    if teacher is not None:
        engines.append(teacher)
    return Placement(
        num_rollout_workers=rollout.num_workers,
        num_learner_ranks=learner.num_ranks,
        num_grader_processes=config.reward.num_processes,
        num_teacher_workers=0 if teacher is None else teacher.num_workers,
        cpus=sum(engine.num_workers * engine.cpus_per_worker for engine in engines)
        + learner.num_ranks * learner.cpus_per_rank,
        gpus=sum(engine.num_workers * engine.gpus_per_worker for engine in engines)
        + learner.num_ranks * learner.gpus_per_rank,
    )


def _learner_rank(config: RunConfig, shape: ModelShape) -> MemoryEstimate:
    """Master weights, gradients and both Adam moments are float32 and sharded over the ranks, those
    of a critic with its own backbone too, and so is a reference policy; the layer at work is
    gathered in the run's precision."""
    shard = -(-shape.num_parameters // config.learner.num_ranks)
    largest_unit = max(shape.parameters_per_layer, shape.vocabulary * shape.hidden)
    gathered = _BYTES[config.model.precision] * largest_unit if config.learner.num_ranks > 1 else 0
    critic = critic_of(config.algorithm)
    has_own_critic = critic is not None and critic.backbone == "separate"
    reference = reference_of(config.algorithm)
    return MemoryEstimate(
        (
            ("base", _LEARNER_BASE),
            ("master weights", 4 * shard),
            ("gradients", 4 * shard),
            ("optimiser", 8 * shard),
            ("critic", 16 * shard * has_own_critic),
            ("reference", 4 * shard * (reference is not None)),
            ("gathered layer", gathered),
            ("activations", _activations(config, shape)),
        )
    )


def _activations(config: RunConfig, shape: ModelShape) -> int:
    """What the backward pass of one microbatch keeps, attention scores recomputed (as flash
    attention does), plus the logits and their gradient in float32."""
    query_width = shape.query_heads * shape.head_dim
    kv_width = shape.key_value_heads * shape.head_dim
    # Two norms' inputs and outputs; q, k, v before and after rotation, attention's output;
    # gate, up, activated gate and their product.
    mlp = 4 * shape.intermediate_per_token
    per_layer = 4 * shape.hidden + 3 * query_width + 4 * kv_width + mlp
    kept = shape.layers * per_layer
    if config.learner.activation_checkpointing != "none":
        kept = shape.layers * shape.hidden + per_layer
    per_token = _BYTES[config.model.precision] * kept + 2 * 4 * shape.vocabulary
    return config.learner.tokens_per_microbatch * per_token


def _engine(config: RunConfig, shape: ModelShape) -> MemoryEstimate:
    """One accelerator's share of an engine; a GPU engine's KV cache takes the rest of its share of
    the GPU and is not counted."""
    weights = _BYTES[config.model.precision] * shape.num_parameters
    kv_cache = 0 if config.rollout.gpus_per_worker else config.rollout.kv_cache_mb * _MIB
    return MemoryEstimate(
        (
            ("base", _ENGINE_BASE),
            ("weights", weights // config.rollout.tensor_parallel),
            ("KV cache", kv_cache),
        )
    )


def _engine_sequences(config: RunConfig, shape: ModelShape) -> int | None:
    if config.rollout.gpus_per_worker:
        return None
    per_token = shape.kv_bytes_per_token(_BYTES[config.model.precision])
    return config.rollout.kv_cache_mb * _MIB // (per_token * config.model.max_length)
