"""Batches that cannot be trained on."""

from __future__ import annotations

from paceline.configs.errors import UserError


class BatchError(UserError):
    """A batch lacks what the algorithm needs of it; no weight was written."""


class NonFiniteError(BatchError):
    """A number that the update depends on is infinite or not a number; no weight was written."""
