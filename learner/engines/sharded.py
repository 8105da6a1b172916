"""The engine of torch's own parallelism: FSDP2, and whatever else the mesh divides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from paceline.configs.schema.learner import OptimizerConfig
from paceline.configs.schema.model import Precision
from paceline.learner.batch.microbatch import Microbatch
from paceline.learner.checkpoints.checkpoint_names import shapes_on_disk, shards_on_disk
from paceline.learner.checkpoints.shards import local_shards
from paceline.learner.engines.mesh import RankMesh
from paceline.learner.engines.optimizer import (
    build_optimizer,
    global_norm,
    has_gradients,
    reset_state,
    take_step,
)
from paceline.learner.engines.parallel.data import shard_policy
from paceline.learner.engines.parallel.passes import Passes, WholePasses
from paceline.learner.engines.parallel.pipeline import PipelinePasses
from paceline.learner.engines.parallel.sequence import sequence_ranks
from paceline.learner.engines.parallel.stages import divide_layers
from paceline.learner.engines.parallel.tensor import divide_matrices
from paceline.learner.engines.training_engine import LossOf, StateDict
from paceline.learner.model.model import Head, PolicyModel
from paceline.weights_sync.layout import Layout, TensorSpec
from paceline.weights_sync.shared_memory import Shard


@dataclass(frozen=True)
class WholeModel:
    """Facts of a model before it is divided; ``shapes`` are of the causal language model's
    parameters, tied weights once."""

    config: PreTrainedConfig
    quadratic_cost: float
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, policy: PolicyModel) -> WholeModel:
        """Take the facts of a model as it was loaded."""
        named = policy.causal_lm.named_parameters()
        shapes = {name: tuple(parameter.shape) for name, parameter in named}
        return cls(policy.causal_lm.config, policy.quadratic_cost(), shapes)

    def layout(self, dtype: str) -> Layout:
        """See `TrainingEngine`."""
        on_disk = shapes_on_disk(self.shapes)
        return Layout(tuple(TensorSpec(name, shape, dtype) for name, shape in on_disk))


class ShardedEngine:
    """A model in parts (one, or a rank's stages of a pipeline), each sharded by the mesh.

    ``repeated`` are names of parameters that another rank of the pipeline holds and speaks for.
    """

    def __init__(
        self,
        whole: WholeModel,
        parts: Sequence[PolicyModel],
        passes: Passes,
        mesh: RankMesh,
        *,
        trains: bool,
        repeated: Set[str] = frozenset(),
    ) -> None:
        self.parts = parts
        self.model_config = whole.config
        self.quadratic_cost = whole.quadratic_cost
        self._whole = whole
        self._passes = passes
        self._mesh = mesh
        self._repeated = repeated
        parameters = [parameter for part in parts for parameter in part.parameters()]
        self._optimizer = build_optimizer(parameters) if trains else None

    def layout(self, dtype: str) -> Layout:
        """See `TrainingEngine`."""
        return self._whole.layout(dtype)

    def add_gradients(
        self, microbatches: Sequence[Microbatch], head: Head, loss_of: LossOf
    ) -> None:
        """See `TrainingEngine`."""
        self._passes.add_gradients(microbatches, head, loss_of)

    def evaluate(
        self, microbatches: Sequence[Microbatch], head: Head
    ) -> Iterator[tuple[Microbatch, Tensor]]:
        """See `TrainingEngine`."""
        return self._passes.evaluate(microbatches, head)

    def take_expert_counts(self) -> NDArray[np.int64] | None:
        """See `TrainingEngine`; a model with experts is in one part."""
        return self.parts[0].expert_counts.take()

    def has_gradients(self) -> bool:
        """See `TrainingEngine`."""
        return has_gradients(self.optimizer)

    def drop_gradients(self) -> None:
        """See `TrainingEngine`."""
        self.optimizer.zero_grad()

    def take_step(self, config: OptimizerConfig, step: int, num_steps: int) -> dict[str, float]:
        """See `TrainingEngine`."""
        return take_step(self.optimizer, config, step, num_steps, self._norm_over_stages())

    def reset_optimizer(self) -> None:
        """See `TrainingEngine`."""
        reset_state(self.optimizer)

    def shards(self) -> Iterator[Shard]:
        """See `TrainingEngine`."""
        for part in self.parts:
            for piece in local_shards(part.causal_lm):
                if piece.name not in self._repeated:
                    yield from shards_on_disk(piece, self._whole.shapes[piece.name])

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrainingEngine`."""
        for part in self.parts:
            for name, parameter in part.causal_lm.named_parameters():
                if name in self._repeated:
                    continue
                tensor = parameter.detach()
                if isinstance(tensor, DTensor):
                    tensor = tensor.full_tensor()
                if self._mesh.is_first:
                    whole = Shard(name, (slice(None),) * tensor.ndim, tensor.cpu())
                    for piece in shards_on_disk(whole, tuple(tensor.shape)):
                        yield piece.name, piece.values

    def state(self) -> StateDict:
        """Return live tensors: what is loaded into them is the engine's state at once."""
        named = dict(self._named_parameters())
        return {
            "model": {name: parameter.detach() for name, parameter in named.items()},
            "optimizer": {name: self.optimizer.state[p] for name, p in named.items()},
        }

    def restore(self, state: StateDict) -> None:
        """See `TrainingEngine`."""

    def to(self, device: torch.device | str) -> None:
        """Move a model that is not sharded."""
        for part in self.parts:
            part.to(device)

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """Optimiser of a model that is trained."""
        assert self._optimizer is not None, "a frozen model has no optimiser"
        return self._optimizer

    def _norm_over_stages(self) -> Tensor:
        named = self._named_parameters()
        counted = [parameter for name, parameter in named if name not in self._repeated]
        norm = global_norm([p.grad for p in counted if p.grad is not None])
        return self._mesh.sum_over_stages(norm.double().square()).sqrt().to(norm.dtype)

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part in self.parts:
            yield from part.trained_parameters()


def shard(
    policy: PolicyModel,
    mesh: RankMesh,
    precision: Precision,
    *,
    trains: bool = True,
    offload: bool = False,
) -> ShardedEngine:
    """Divide a whole model, as it was loaded, over the mesh.

    With ``offload`` it lies in host memory, and so does what trains it (if it ``trains``).
    """
    whole = WholeModel.of(policy)
    stages = divide_layers(policy, mesh) if mesh.sizes["pipeline"] > 1 else []
    parts: Sequence[PolicyModel] = stages or [policy]
    for part in parts:
        part.divide_tokens(sequence_ranks(whole.config, mesh))
        if mesh.sizes["tensor"] > 1:
            divide_matrices(part, mesh)
        if mesh.devices is not None:
            shard_policy(part, mesh, precision, offload=offload)
        if not offload:
            part.to(mesh.device)
        if not trains:
            part.requires_grad_(False)
    passes: Passes = (
        PipelinePasses(stages, mesh, getattr(torch, precision))
        if stages
        else WholePasses(policy, mesh.num_averaged)
    )
    repeated = frozenset(name for stage in stages for name in stage.repeated)
    return ShardedEngine(whole, parts, passes, mesh, trains=trains, repeated=repeated)
