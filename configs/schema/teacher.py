"""A model that judges samples token by token, served like the policy and never trained."""

from __future__ import annotations

from pydantic import Field

from paceline.configs.schema.base import Section
from paceline.configs.schema.rollout import RolloutConfig


class TeacherConfig(Section):
    """One vLLM engine of the teacher's in each of `num_workers` Ray actors."""

    path: str
    """The teacher: a folder in Hugging Face format, or a hub name; of the policy's tokenizer."""

    num_workers: int = Field(default=1, ge=1)
    """Workers, each with an engine of its own."""

    tensor_parallel: int = Field(default=1, ge=1)
    """Accelerators an engine is spread over."""

    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs Ray reserves for a worker; 0 runs it on the CPU."""

    cpus_per_worker: float = Field(default=0, ge=0)
    """CPUs Ray reserves for a worker; 0 lets workers share a small machine."""

    max_num_seqs: int = Field(default=64, ge=1)
    """Completions an engine scores together."""

    kv_cache_mb: int = Field(default=64, ge=8)
    """KV cache of a CPU engine, in MiB."""

    gpu_memory_utilization: float = Field(default=0.85, gt=0, lt=1)
    """Share of a GPU's memory that an engine may take."""

    enforce_eager: bool = True
    """Run without graph capture and compilation; the CPU always does."""

    max_restarts: int = Field(default=1, ge=0)
    """How often a dead worker is replaced before the run ends with its error."""

    claim_seconds: float = Field(default=600.0, gt=0)
    """Longest a worker may hold a request: what it has not scored by then is asked again."""

    answer_seconds: float = Field(default=60.0, gt=0)
    """A worker is replaced when its process gives no sign of life for this long, or leaves an
    interrupt unanswered."""

    def as_rollout(self) -> RolloutConfig:
        """Return the same settings as a rollout worker's engine takes them."""
        return RolloutConfig.model_validate(self.model_dump(exclude={"path"}))
