"""FSDP2: weights, gradients and optimiser state in shards, gathered a layer at a time."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from paceline.configs.schema.model import Precision
from paceline.learner.engines.mesh import RankMesh
from paceline.learner.model.model import PolicyModel


def shard_policy(
    policy: PolicyModel, mesh: RankMesh, precision: Precision, *, offload: bool = False
) -> None:
    """Shard every decoder layer, then the rest, over the data and sequence ranks, in place.

    With ``replicate`` ranks each such group holds all shards (HSDP). Master weights and gradient
    reductions stay float32; forward and backward run in ``precision``. The rest is gathered again
    in the backward pass too: kept whole after a forward pass without a backward, it would be served
    stale after the next optimiser step. With ``offload`` the shards, and their gradients, lie in
    host memory.
    """
    mixed = MixedPrecisionPolicy(
        param_dtype=getattr(torch, precision), reduce_dtype=torch.float32, output_dtype=None
    )
    is_pinned = mesh.device.type == "cuda"
    place = CPUOffloadPolicy(pin_memory=is_pinned) if offload else OffloadPolicy()
    for module in (*policy.decoder_layers, policy):
        fully_shard(
            module,
            mesh=_shard_mesh(mesh),
            mp_policy=mixed,
            offload_policy=place,
            reshard_after_forward=True,
        )


def _shard_mesh(mesh: RankMesh) -> DeviceMesh:
    """Return one dimension to shard over, after that of the replicas where there are any."""
    assert mesh.devices is not None, "sharding needs a process group"
    shards = mesh.devices["shard", "sequence"]._flatten("shards")
    if mesh.sizes["tensor"] > 1:
        # norms are summed over both at once
        mesh.devices["shard", "sequence", "tensor"]._flatten("matrix_shards")
    if mesh.sizes["replicate"] == 1:
        return shards
    return DeviceMesh._concatenate([mesh.devices["replicate"], shards])
