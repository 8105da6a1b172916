"""Interface of engines: training of one model on one rank, whatever shards it.

The learner sees a model as a `TrainingEngine`: passes over microbatches, an optimiser step, and
the weights in global coordinates. `sharded.py` is torch's own (FSDP2 and the other dimensions of
the mesh), `deepspeed_engine.py` is DeepSpeed's ZeRO. Every rank makes every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from paceline.configs.schema.learner import OptimizerConfig
from paceline.learner.batch.microbatch import Microbatch
from paceline.learner.model.model import Head
from paceline.weights_sync.layout import Layout
from paceline.weights_sync.shared_memory import Shard

LossOf = Callable[[Microbatch, tuple[Tensor, ...]], Tensor]
"""Maps a microbatch and the model's outputs for its trained tokens to the scalar loss."""

StateDict = dict[str, Any]


class TrainingEngine(Protocol):
    """A model's shard, its optimiser, and passes over microbatches."""

    model_config: PreTrainedConfig
    """Configuration of the whole model."""

    quadratic_cost: float
    """Cost of attention next to the rest, see `PolicyModel.quadratic_cost`."""

    def layout(self, dtype: str) -> Layout:
        """Return where the causal language model's parameters lie when published as ``dtype``."""

    def add_gradients(
        self, microbatches: Sequence[Microbatch], head: Head, loss_of: LossOf
    ) -> None:
        """Add the gradients of the sum of all losses, over all ranks, to the parameters'.

        ``loss_of`` is called where a microbatch's outputs are: on the last stage of a pipeline.
        """

    def evaluate(
        self, microbatches: Sequence[Microbatch], head: Head
    ) -> Iterator[tuple[Microbatch, Tensor]]:
        """Yield the first output for each microbatch's trained tokens, without gradients; ranks
        that do not have it yield nothing."""

    def take_expert_counts(self) -> NDArray[np.int64] | None:
        """Return, and reset, the trained tokens routed to each expert by this rank's microbatches:
        int64 [layers with experts, experts]; None for a model without experts."""

    def has_gradients(self) -> bool:
        """Return whether gradients were added since the last step."""

    def drop_gradients(self) -> None:
        """Drop the gradients."""

    def take_step(self, config: OptimizerConfig, step: int, num_steps: int) -> dict[str, float]:
        """Clip the gradients to a global 2-norm, write the weights, drop the gradients.

        Returns:
            ``grad_norm`` before clipping, and ``learning_rate``.

        Raises:
            NonFiniteError: on every rank, before anything is written, if the norm is not finite.
        """

    def reset_optimizer(self) -> None:
        """Forget the moments and step counts."""

    def shards(self) -> Iterator[Shard]:
        """Yield this rank's piece of every parameter of the causal language model, in float32."""

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter of the causal language model whole, float32 on the CPU, each on
        one rank: for a folder that other programs load."""

    def state(self) -> StateDict:
        """Return master weights and optimiser state by parameter name, as global tensors: the same
        for every engine and mesh, so that each loads what another wrote."""

    def restore(self, state: StateDict) -> None:
        """Continue from what was loaded into ``state()``'s tensors."""
