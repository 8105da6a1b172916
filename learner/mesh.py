"""Process group and FSDP2 sharding of the learner's ranks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from paceline.configs.errors import ClusterError
from paceline.configs.schema.learner import LearnerConfig
from paceline.configs.schema.model import Precision
from paceline.learner.model import PolicyModel
from paceline.weights_sync.layout import Layout, TensorSpec
from paceline.weights_sync.shared_memory import Shard

T = TypeVar("T")


def join_process_group(
    config: LearnerConfig, rank: int, rendezvous: str | None, device: torch.device
) -> None:
    """Meet the other ranks at ``rendezvous`` (``tcp://host:port``); alone, meet nobody.

    Raises:
        ClusterError: the ranks did not all arrive within ``collective_timeout_seconds``.
    """
    store = dist.HashStore() if config.num_ranks == 1 else None
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
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


def shard_policy(
    policy: PolicyModel,
    device: torch.device,
    num_ranks: int,
    precision: Precision,
    *,
    offload: bool = False,
) -> None:
    """Shard every decoder layer, then the rest, over all ranks, in place.

    Master weights and gradient reductions stay float32; forward and backward run in ``precision``.
    The rest is gathered again in the backward pass too: kept whole after a forward pass without a
    backward, it would be served stale after the next optimiser step. With ``offload`` the shards
    lie in host memory.
    """
    mesh = init_device_mesh(device.type, (num_ranks,))
    mixed = MixedPrecisionPolicy(
        param_dtype=getattr(torch, precision), reduce_dtype=torch.float32, output_dtype=None
    )
    place = CPUOffloadPolicy() if offload and device.type == "cuda" else OffloadPolicy()
    for module in (*policy.decoder_layers, policy):
        fully_shard(
            module, mesh=mesh, mp_policy=mixed, offload_policy=place, reshard_after_forward=True
        )


def layout_of(model: nn.Module, dtype: str) -> Layout:
    """Where a model's parameters lie when they are published as ``dtype``; tied weights once."""
    return Layout(
        tuple(TensorSpec(name, tuple(p.shape), dtype) for name, p in model.named_parameters())
    )


def local_shards(model: nn.Module) -> Iterator[Shard]:
    """This rank's piece of every parameter in global coordinates; tied weights once.

    Pieces of all ranks tile each tensor exactly once. A rank without a piece of a small tensor
    yields none for it.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            yield Shard(name, (slice(None),) * parameter.ndim, parameter)
            continue
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if 0 not in shape:
            index = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            yield Shard(name, index, parameter.to_local())


def gather_objects(mine: T) -> list[T]:
    """Everybody's ``mine``, in order of ranks; alone, just one's own."""
    if not dist.is_initialized():
        return [mine]
    gathered = [mine] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered
