"""Activity of a rank, reported while it works, for a thread that reads it when a run hangs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from paceline.learner.checkpoints.background_save import GROUP_NAME


class Activity:
    """Words for what a rank is doing; empty between two calls.

    >>> activity = Activity()
    >>> with activity.during("optimiser"):
    ...     activity.tell("the second of two")
    ...     activity.now
    'the second of two'
    >>> activity.now
    ''
    """

    def __init__(self) -> None:
        self.now = ""

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Say what is done in the block; afterwards, and if it fails, what was said before."""
        before, self.now = self.now, what
        try:
            yield
        finally:
            self.now = before

    def tell(self, what: str) -> None:
        """Say how far the block has come."""
        self.now = what


def collectives_begun() -> dict[str, int]:
    """Count the collectives this rank has begun, by process group: its ranks, and its place among
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
