"""Announcement of published weights, and errors about them."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.configs.errors import UserError
from paceline.configs.vocabulary import WeightVersion
from paceline.weights_sync.layout import Layout


@dataclass(frozen=True)
class WeightHandle:
    """The place where a version can be read, and the checksum its bytes must have (xxh3-64)."""

    version: WeightVersion
    path: str
    checksum: int
    layout: Layout


Acknowledgement = tuple[WeightVersion | None, int | None]
"""Version that an engine serves, and the checksum of the bytes it was loaded from."""


class WeightSyncError(UserError):
    """Weights cannot be published, or are missing, torn or not those announced: they must not be
    served."""
