"""Records as text, for stores that keep text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from paceline.controller.ledger.events import Event, Kind, LedgerError

Row = tuple[str, int, float, Mapping[str, Any]]
"""Kind, key, time and detail of an event: what JSON can hold."""


def as_row(event: Event) -> Row:
    """An event without its group."""
    return event.kind.value, event.key, event.time, event.detail


def from_row(row: Any, where: str) -> Event:
    """What `as_row` gave, its detail perhaps still in JSON.

    Raises:
        LedgerError: it is damaged; ``where`` names the row and its store.
    """
    try:
        kind, key, time, detail = row
        if isinstance(detail, str):
            detail = json.loads(detail)
        if not isinstance(detail, dict):
            raise TypeError(f"detail {detail!r}")
        return Event(Kind(kind), int(key), float(time), detail)
    except (TypeError, ValueError) as error:
        raise LedgerError(
            f"{where} is damaged ({' '.join(str(error).split())}): restore the ledger from a copy; "
            "or move it away, and --resume samples anew what the checkpoint had in flight"
        ) from error
