"""Forecast of what a run needs, before anything is started: actors, CPUs, GPUs and memory.

Memory figures are estimates to catch a run that cannot fit, not measurements: allocator slack,
fragmentation and communication buffers are left out. A learner rank's are tested against what ranks
on a CPU hold; on a GPU they are unmeasured.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.configs.forecast.learner_memory import learner_memory
from paceline.configs.forecast.model_shape import ModelShape, model_shape
from paceline.configs.forecast.rank_part import BYTES
from paceline.configs.schema import RunConfig
from paceline.configs.schema.rollout import RolloutConfig
from paceline.configs.schema.teacher import TeacherConfig

_MIB = 1024**2
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
    """Forecast that `paceline check` prints; memory and parameters are None for an unknown shape.

    ``learner_host`` is what a rank with a GPU holds in host memory, None for one without.
    ``engine_sequences`` is how many sequences of full length the KV cache of a CPU engine holds;
    None for GPU engines, whose cache is what `gpu_memory_utilization` leaves.
    """

    placement: Placement
    num_parameters: int | None
    learner_rank: MemoryEstimate | None
    learner_host: MemoryEstimate | None
    engine: MemoryEstimate | None
    engine_sequences: int | None


def estimate(config: RunConfig) -> Estimate:
    """Estimate placement and memory from the configuration alone."""
    shape = model_shape(config.model)
    if shape is None:
        return Estimate(placement(config), None, None, None, None, None)
    rank, host = _learner(config, shape)
    return Estimate(
        placement=placement(config),
        num_parameters=shape.num_parameters,
        learner_rank=rank,
        learner_host=host,
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


def _learner(config: RunConfig, shape: ModelShape) -> tuple[MemoryEstimate, MemoryEstimate | None]:
    """Return a rank's memory where it computes, and in host memory beside its GPU."""
    found, base = learner_memory(config, shape), ("base", _LEARNER_BASE)
    rank, host = found.rank.items(), found.host.items()
    if not config.learner.gpus_per_rank:
        return MemoryEstimate((base, *rank)), None
    return MemoryEstimate(tuple(rank)), MemoryEstimate((base, *host))


def _engine(config: RunConfig, shape: ModelShape) -> MemoryEstimate:
    """Return one accelerator's share of an engine. A GPU engine's KV cache takes the rest of its
    share of the GPU and is not counted."""
    weights = BYTES[config.model.precision] * shape.num_parameters
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
    per_token = shape.kv_bytes_per_token(BYTES[config.model.precision])
    return config.rollout.kv_cache_mb * _MIB // (per_token * config.model.max_length)
