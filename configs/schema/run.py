"""The whole run: one frozen ``RunConfig``."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from paceline.configs.schema.algorithm import (
    AlgorithmConfig,
    PolicyAlgorithm,
    PreferenceAlgorithm,
    SupervisedAlgorithm,
    WarmStartConfig,
)
from paceline.configs.schema.base import Section
from paceline.configs.schema.data import DataConfig, ReasoningGymSource
from paceline.configs.schema.learner import LearnerConfig
from paceline.configs.schema.model import ModelConfig
from paceline.configs.schema.reward import GraderConfig
from paceline.configs.schema.rollout import RolloutConfig
from paceline.configs.schema.store import SQLiteStoreConfig, StoreConfig
from paceline.configs.schema.teacher import TeacherConfig


class LoopConfig(Section):
    """The one training loop: how much it trains, and how far rollouts may lag behind."""

    num_steps: int = Field(default=100, ge=1)
    """Optimiser steps."""

    groups_per_step: int = Field(default=32, ge=1)
    """Prompts (groups) trained in one step: P."""

    samples_per_group: int = Field(default=16, ge=1)
    """Completions sampled for a prompt: n. The demonstration of `sft` is 1, the pair of `dpo` 2."""

    max_lag: int = Field(default=1, ge=0)
    """No trained token is older than this many weight versions: S. 0 is synchronous training."""

    window_fraction: float = Field(default=0.0, ge=0, lt=1)
    """How far finished groups may overtake an unfinished older one, as a fraction of the in-flight
    budget; 0 trains in strict order of admission. The budget shrinks so that `max_lag` still
    holds."""

    pacing: bool = True
    """Let only as much work in as keeps the learner busy, below the freshness budget where rollouts
    are fast; false always uses the whole budget."""

    buffer_mb: int = Field(default=1024, ge=1)
    """Samples the controller may hold in memory, in MiB; sampling ahead stops there."""


class EvaluationConfig(Section):
    """Accuracy on the held-out prompts, greedy and at temperature 1."""

    every_steps: int | None = Field(default=None, ge=1)
    """Evaluate greedily this often during training; always before and after it."""

    num_examples: int = Field(default=12, ge=0)
    """Held-out generations kept for the report, before and after."""


class CheckpointConfig(Section):
    """Checkpoints, which an interrupted run is resumed from."""

    every_steps: int | None = Field(default=25, ge=1)
    """Save this often; an interrupt and the end always save."""

    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""


class ObservabilityConfig(Section):
    """Views of a run while it works, and the records it leaves behind."""

    live: bool = True
    """Live view on a terminal; plain lines where the output is not one."""

    tensorboard: bool = True
    """Write TensorBoard event files."""

    samples_per_step: int = Field(default=2, ge=0)
    """Rollouts a step that are written to `samples.jsonl`."""

    self_check_steps: int = Field(default=2, ge=0)
    """After this many first weight updates, greedy tokens of the engines are compared with the
    learner's own forward pass."""


class ClusterConfig(Section):
    """The Ray cluster that the run uses."""

    address: str | None = None
    """`auto`, `host:port` or `ray://…` of a running cluster; absent: the one a submitted job runs
    in, else a private local one."""

    object_store_mb: int = Field(default=256, ge=80)
    """Object store of a private local cluster, in MiB."""


class RunConfig(Section):
    """Everything that decides a run; saved whole with its results."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is `output_dir/name`."""

    output_dir: str = "runs"
    """Folder that holds the run folders."""

    seed: int = Field(default=0, ge=0)
    """Seed of initial weights, sampling and problem order."""

    model: ModelConfig
    """The model."""

    data: DataConfig
    """The prompts."""

    reward: GraderConfig
    """The grader."""

    rollout: RolloutConfig = RolloutConfig()
    """The rollout workers."""

    teacher: TeacherConfig | None = None
    """The teacher, for `algorithm.type: distillation`."""

    learner: LearnerConfig = LearnerConfig()
    """The learner ranks."""

    algorithm: AlgorithmConfig = PolicyAlgorithm.model_validate({"type": "grpo"})
    """The objective."""

    loop: LoopConfig = LoopConfig()
    """The loop."""

    warm_start: WarmStartConfig | None = None
    """Supervised start; null starts from the model as it is."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""

    store: StoreConfig = SQLiteStoreConfig()
    """The ledger."""

    observability: ObservabilityConfig = ObservabilityConfig()
    """Output: what is shown and written."""

    cluster: ClusterConfig = ClusterConfig()
    """The Ray cluster."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.rollout.sampling.max_tokens >= self.model.max_length:
            raise ValueError(
                f"rollout.sampling.max_tokens ({self.rollout.sampling.max_tokens}) leaves no room "
                f"for a prompt in model.max_length ({self.model.max_length}): lower the former"
            )
        drafting = self.rollout.drafting
        if drafting is not None and drafting.max_drift is not None and self.loop.max_lag == 0:
            raise ValueError(
                "rollout.drafting.max_drift is measured on samples of older versions, and "
                "loop.max_lag: 0 trains on none: set max_drift to null, or raise max_lag"
            )
        if self.loop.samples_per_group < 2 and compares_siblings(self.algorithm):
            raise ValueError(
                f"loop.samples_per_group must be at least 2 for {self.algorithm.type}: "
                "a group of 1 has nothing to compare with"
            )
        if self.reward.type == "reasoning_gym" and not isinstance(
            self.data.source, ReasoningGymSource
        ):
            raise ValueError(
                f"reward.type reasoning_gym needs data.source.type reasoning_gym, "
                f"got {self.data.source.type}: use reward.type exact or math"
            )
        self._teacher_fits()
        if self.rollout.drafting is not None and self.rollout.tensor_parallel > 1:
            raise ValueError(
                "rollout.drafting works with rollout.tensor_parallel 1 only, got "
                f"{self.rollout.tensor_parallel}: leave one of them out"
            )
        self._given_completions_fit()
        if self.learner.tokens_per_microbatch < self.model.max_length:
            raise ValueError(
                f"learner.tokens_per_microbatch ({self.learner.tokens_per_microbatch}) is less "
                f"than model.max_length ({self.model.max_length}): a long sample would not fit"
            )
        if self.rollout.gpus_per_worker and self.rollout.tensor_parallel > max(
            1, self.rollout.gpus_per_worker
        ):
            raise ValueError(
                f"rollout.tensor_parallel ({self.rollout.tensor_parallel}) exceeds "
                f"rollout.gpus_per_worker ({self.rollout.gpus_per_worker})"
            )
        return self

    def _given_completions_fit(self) -> None:
        num_given = given_completions(self.algorithm)
        if num_given is None:
            return
        if self.data.curriculum is not None:
            raise ValueError(
                "data.curriculum goes by the rewards of samples, and "
                f"{self.algorithm.type} samples nothing: remove the curriculum"
            )
        if self.loop.samples_per_group != num_given:
            raise ValueError(
                f"loop.samples_per_group is {self.loop.samples_per_group}, but "
                f"{self.algorithm.type} trains on {num_given} of the data source's completions of "
                f"a prompt: set it to {num_given}"
            )

    def _teacher_fits(self) -> None:
        is_taught = (
            isinstance(self.algorithm, PolicyAlgorithm)
            and self.algorithm.advantage.type == "teacher_gap"
        )
        if is_taught and self.teacher is None:
            raise ValueError("algorithm.advantage.type teacher_gap needs a teacher: give its path")
        if self.teacher is not None and given_completions(self.algorithm) is not None:
            raise ValueError(
                f"a teacher has nothing to look at: {self.algorithm.type} samples nothing; leave "
                "the teacher out"
            )
        sampling = self.rollout.sampling
        if is_taught and (sampling.temperature, sampling.top_p, sampling.top_k) != (1.0, 1.0, 0):
            raise ValueError(
                "a teacher scores tokens at temperature 1 among all others: set "
                "rollout.sampling.temperature to 1, top_p to 1 and top_k to 0"
            )


def given_completions(algorithm: AlgorithmConfig) -> int | None:
    """Return how many completions of a prompt the data source has to learn from; None: sample
    them."""
    if isinstance(algorithm, SupervisedAlgorithm):
        return 1
    return 2 if isinstance(algorithm, PreferenceAlgorithm) else None


def compares_siblings(algorithm: AlgorithmConfig) -> bool:
    """Return whether a sample's worth is relative to the others of its group."""
    return isinstance(algorithm, PolicyAlgorithm) and (
        algorithm.advantage.type in ("group_relative", "leave_one_out")
        or algorithm.zero_signal == "drop"
    )
