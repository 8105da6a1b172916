"""Where a rank stands, told while it works: for whoever asks why nothing moves."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from paceline.learner.checkpoints.background_save import GROUP_NAME


def collectives_begun() -> dict[str, int]:
    """How many collectives this rank has begun, by process group: its ranks, and its place among
    the groups of the same ranks. Those of saves in the background do not count."""
    found: dict[str, int] = {}
    if not dist.is_initialized():
        return found
    for group in list(_world.pg_names):
        if group.group_desc == GROUP_NAME:
            continue
        ranks = ",".join(map(str, dist.get_process_group_ranks(group)))
        place = sum(name.startswith(f"{ranks}#") for name in found)
        begun = group._get_sequence_number_for_group()  # type: ignore[attr-defined]  # not in stubs
        found[f"{ranks}#{place}"] = begun
    return found
