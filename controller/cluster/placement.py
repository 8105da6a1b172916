"""Room for the learner's ranks on the nodes of a cluster."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from paceline.configs.errors import ClusterError

Placement = Literal["pack", "spread"]
PLACEMENT_SECONDS = 120.0
"""How long a cluster may take to find room for the ranks, or to grow it."""


async def reserve(
    num_ranks: int, cpus: float, gpus: float, placement: Placement
) -> PlacementGroup | None:
    """Reserve room for all ranks at once, a bundle each; None for ranks that reserve nothing.

    Raises:
        ClusterError: no nodes have it.
    """
    bundle = {kind: count for kind, count in (("CPU", cpus), ("GPU", gpus)) if count}
    if not bundle:
        return None
    strategy = "STRICT_SPREAD" if placement == "spread" else "PACK"
    room = placement_group([bundle] * num_ranks, strategy)
    if await asyncio.to_thread(room.wait, PLACEMENT_SECONDS):
        return room
    release(room)
    each = ", ".join(f"{count:g} {kind}s" for kind, count in bundle.items())
    nodes = sum(node["Alive"] for node in ray.nodes())
    spread = " on a node of its own" if placement == "spread" else ""
    raise ClusterError(
        f"no room for {num_ranks} learner ranks of {each} each{spread} on {nodes} nodes within "
        f"{PLACEMENT_SECONDS:g} s: lower learner.num_ranks or what a rank reserves, choose "
        "learner.placement: pack, or join a larger cluster"
    )


def in_bundle(room: PlacementGroup | None, rank: int) -> dict[str, Any]:
    """Return a rank's place in what was reserved, as options of its actor."""
    if room is None:
        return {}
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(room, rank)}


def release(room: PlacementGroup | None) -> None:
    """Give back what was reserved."""
    if room is not None:
        remove_placement_group(room)
