"""The learner's ranks by what they divide, and who of them says what is known.

Ranks lie in one `DeviceMesh` (pipeline, replicate, shard, sequence, tensor), in this order from the
farthest neighbours to the nearest: tensor ranks talk in every layer, pipeline stages once a
microbatch. Ranks that differ in ``replicate`` or ``shard`` train different samples; the others work
on the same ones.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from paceline.configs.errors import ClusterError
from paceline.configs.schema.learner import LearnerConfig

T = TypeVar("T")

DIMENSIONS = ("pipeline", "replicate", "shard", "sequence", "tensor")


class RankMesh:
    """Position of one rank in the mesh.

    ``devices`` is None for a rank that is alone without a process group; ``rank`` counts all ranks,
    ``data_rank`` of ``num_data_ranks`` says which share of the samples it trains. A pipeline has
    ``stages_per_rank`` times as many stages as ranks.
    """

    def __init__(
        self, config: LearnerConfig, device: torch.device, *, is_distributed: bool
    ) -> None:
        parallel = config.parallel
        self.device = device
        self.rank = dist.get_rank() if is_distributed else 0
        self.num_data_ranks = config.num_data_ranks
        self.stages_per_rank = parallel.stages_per_rank
        self.sizes = {
            "pipeline": parallel.pipeline,
            "replicate": parallel.replicate,
            "shard": config.num_data_ranks // parallel.replicate,
            "sequence": parallel.sequence,
            "tensor": parallel.tensor,
        }
        self.devices: DeviceMesh | None = None
        if is_distributed:
            sizes = tuple(self.sizes[name] for name in DIMENSIONS)
            self.devices = init_device_mesh(device.type, sizes, mesh_dim_names=DIMENSIONS)
        self.data_rank = self.rank_in("replicate") * self.sizes["shard"] + self.rank_in("shard")

    def rank_in(self, name: str) -> int:
        """Return the place among the ranks that differ from this one in dimension ``name`` only."""
        return 0 if self.devices is None else self.devices.get_local_rank(name)

    @property
    def num_averaged(self) -> int:
        """Ranks over which FSDP takes the mean of gradients, which are parts of one sum."""
        return self.num_data_ranks * self.sizes["sequence"]

    @property
    def num_token_ranks(self) -> int:
        """Ranks that divide a row's tokens: its length must be a multiple of them."""
        return self.sizes["sequence"] * self.sizes["tensor"]

    @property
    def is_first(self) -> bool:
        """True for the first rank of those with its stage of the pipeline."""
        return all(self.rank_in(name) == 0 for name in DIMENSIONS if name != "pipeline")

    @property
    def reports(self) -> bool:
        """True for the rank that reports for those that work on the same samples: one of the
        sequence and tensor ranks of a pipeline's last stage."""
        return (
            self.rank_in("pipeline") == self.sizes["pipeline"] - 1
            and self.rank_in("sequence") == 0
            and self.rank_in("tensor") == 0
        )

    def gather(self, mine: T) -> list[T]:
        """Return, on every rank, ``mine`` of the ranks that report, by share of the samples."""
        return [found for found, reports in self.gather_all((mine, self.reports)) if reports]

    def gather_all(self, mine: T) -> list[T]:
        """Return, on every rank, ``mine`` of all ranks, in their order."""
        if self.devices is None:
            return [mine]
        gathered = [mine] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        return gathered

    def sum_over_stages(self, value: Tensor) -> Tensor:
        """Sum a value over the ranks of a pipeline, in float64; all get the same sum."""
        total = value.to(self.device, torch.float64)
        if self.sizes["pipeline"] > 1:
            assert self.devices is not None
            dist.all_reduce(total, group=self.devices.get_group("pipeline"))
        return total

    def wait_for_all(self) -> None:
        """Return once every rank came here."""
        if self.devices is not None:
            dist.barrier()


def require_determinism() -> None:
    """Allow only deterministic kernels of torch in this process from now on.

    cuBLAS needs a workspace of its own for that, which it reads from the environment once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def join_process_group(
    config: LearnerConfig, rank: int, rendezvous: str | None, device: torch.device
) -> None:
    """Join the other ranks at ``rendezvous`` (``tcp://host:port``); a rank alone returns at once.

    Raises:
        ClusterError: the ranks did not all arrive within ``collective_timeout_seconds``.
    """
    store = dist.HashStore() if config.num_ranks == 1 else None
    try:
        dist.init_process_group(
            # what was off-loaded, and what is saved, is on the CPU
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=None if store is not None else rendezvous,
            store=store,
            rank=rank,
            world_size=config.num_ranks,
            timeout=timedelta(seconds=config.collective_timeout_seconds),
        )
    except dist.DistError as error:
        raise ClusterError(
            f"learner rank {rank} of {config.num_ranks} did not meet the others at {rendezvous} "
            f"within {config.collective_timeout_seconds:g} s: look at the other ranks' logs"
        ) from error
