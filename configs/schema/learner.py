"""The learner ranks and their optimiser."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from paceline.configs.schema.base import Section

Checkpointing = Literal["none", "layers", "chunks"]


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


class ParallelConfig(Section):
    """The division of work over ``num_ranks`` ranks. The ranks that remain shard the weights:
    ``shard`` = ``num_ranks`` / (``replicate`` * ``tensor`` * ``pipeline`` * ``sequence``)."""

    replicate: int = Field(default=1, ge=1)
    """Groups of ranks that each hold all weights, sharded among themselves (HSDP)."""

    tensor: int = Field(default=1, ge=1)
    """Ranks that divide every matrix: heads, intermediate features and vocabulary."""

    pipeline: int = Field(default=1, ge=1)
    """Ranks that divide the layers, one after the other."""

    sequence: int = Field(default=1, ge=1)
    """Ranks that divide every row of tokens, and its heads inside attention (Ulysses)."""

    schedule: Literal["1f1b", "interleaved"] = "1f1b"
    """Order of forward and backward passes in a pipeline; ``interleaved`` gives each rank
    ``stages_per_rank`` runs of layers, which shortens the wait at both ends."""

    stages_per_rank: int = Field(default=1, ge=1)
    """Stages of the pipeline that a rank holds: 1 with ``1f1b``, 2 or more with ``interleaved``."""

    @model_validator(mode="after")
    def _stages_fit_the_schedule(self) -> Self:
        if (self.schedule == "interleaved") != (self.stages_per_rank > 1):
            raise ValueError(
                f"parallel.schedule {self.schedule} with parallel.stages_per_rank "
                f"{self.stages_per_rank}: 1f1b has one stage a rank, interleaved two or more"
            )
        return self

    @property
    def model_ranks(self) -> int:
        """Ranks that work on the same samples."""
        return self.tensor * self.pipeline * self.sequence


class DeepSpeedConfig(Section):
    """State that ``engine: deepspeed`` divides over the ranks."""

    stage: Literal[1, 2, 3] = 2
    """ZeRO stage: 1 shards the optimiser state, 2 the gradients too, 3 the weights too."""

    offload_optimizer: bool = False
    """Keep optimiser state, and take its steps, in host memory."""


class LearnerConfig(Section):
    """Ranks that train one model together."""

    num_ranks: int = Field(default=1, ge=1)
    """Processes of the learner; ``parallel`` says what they divide."""

    engine: Literal["fsdp", "deepspeed"] = "fsdp"
    """Sharding and training of the models: torch's FSDP2 with ``parallel``, or DeepSpeed's ZeRO."""

    parallel: ParallelConfig = ParallelConfig()
    """Dimensions that ranks divide besides weights and samples."""

    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Settings of ``engine: deepspeed``."""

    gpus_per_rank: float = Field(default=0, ge=0)
    """GPUs Ray reserves for a rank; 0 runs it on the CPU with gloo."""

    cpus_per_rank: float = Field(default=0, ge=0)
    """CPUs Ray reserves for a rank; 0 lets ranks share a small machine."""

    tokens_per_microbatch: int = Field(default=4096, ge=1)
    """Upper bound of packed tokens in one forward and backward pass on a rank."""

    share_prompts: bool = True
    """Lay the prompt of a group into a row once, for all of its samples; gradients are those of
    samples with a prompt each."""

    deterministic: bool = False
    """Use only kernels that give the same result every time, and fail where there is none. On the
    CPU the same machine and settings give the same result anyway; on GPUs it is slower."""

    activation_checkpointing: Checkpointing = "none"
    """Activations that the backward pass recomputes: none, those of ``layers`` (true) one after the
    other, or of ``chunks`` of their tokens, for rows as long as memory allows."""

    tokens_per_chunk: int = Field(default=1024, ge=1)
    """Tokens that a layer works on at a time with ``activation_checkpointing: chunks``."""

    offload_optimizer: bool = False
    """Keep weights, gradients and optimiser state in host memory and take the steps there; a GPU
    holds the layers at work. On the CPU nothing moves. For ``engine: fsdp``."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser."""

    collective_timeout_seconds: float = Field(default=120.0, gt=0)
    """A collective that takes longer ends the run instead of hanging it."""

    hang_seconds: float | None = Field(default=None, gt=0)
    """A rank that keeps the others waiting or gives no sign of life for so long is named and ends
    the run; half of ``collective_timeout_seconds`` where nothing is set."""

    placement: Literal["pack", "spread"] = "pack"
    """Nodes for ranks that reserve CPUs or GPUs: as few as possible, or each rank its own."""

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _yes_is_layers(cls, value: object) -> object:
        return {False: "none", True: "layers"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _hangs_are_named_first(self) -> Self:
        if self.longest_wait_seconds >= self.collective_timeout_seconds:
            raise ValueError(
                f"learner.hang_seconds ({self.hang_seconds:g}) must be less than "
                f"learner.collective_timeout_seconds ({self.collective_timeout_seconds:g}): a rank "
                "is to be named before its neighbours give up"
            )
        return self

    @model_validator(mode="after")
    def _ranks_divide(self) -> Self:
        parallel = self.parallel
        product = parallel.replicate * parallel.model_ranks
        if self.num_ranks % product:
            raise ValueError(
                f"learner.num_ranks ({self.num_ranks}) must be a multiple of replicate * tensor * "
                f"pipeline * sequence ({product})"
            )
        if self.engine == "deepspeed" and product > 1:
            raise ValueError(
                "learner.engine deepspeed divides weights and samples only: leave learner.parallel "
                "at its defaults, or use engine: fsdp"
            )
        if self.engine == "deepspeed" and self.offload_optimizer:
            raise ValueError(
                "learner.offload_optimizer is for engine fsdp: with engine deepspeed set "
                "learner.deepspeed.offload_optimizer"
            )
        return self

    @model_validator(mode="after")
    def _chunks_compose(self) -> Self:
        if self.activation_checkpointing != "chunks":
            return self
        if self.engine == "deepspeed" and self.deepspeed.stage == 3:
            raise ValueError(
                "learner.activation_checkpointing chunks needs a layer's weights whole from its "
                "first chunk to its last, ZeRO stage 3 gathers them a matrix at a time: use stage "
                "2, or engine: fsdp"
            )
        for name in ("sequence", "tensor"):
            if (size := getattr(self.parallel, name)) > 1:
                raise ValueError(
                    "learner.activation_checkpointing chunks goes through whole rows, "
                    f"learner.parallel.{name} ({size}) divides them over ranks: use one of them"
                )
        return self

    @property
    def num_data_ranks(self) -> int:
        """Shares that the samples of a batch are divided into."""
        return self.num_ranks // self.parallel.model_ranks

    @property
    def longest_wait_seconds(self) -> float:
        """Longest time that ranks may wait for a rank that hangs, in seconds."""
        return self.hang_seconds or self.collective_timeout_seconds / 2
