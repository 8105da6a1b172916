"""Records as text, for stores that keep text."""

from __future__ import annotations

import json
from typing import Any

from paceline.controller.ledger.events import Event, Kind, LedgerError

Row = tuple[str, int, float, str]
"""Kind, key, time and detail of a event, the latter in JSON."""


def as_row(event: Event) -> Row:
    """A event without its group."""
    return event.kind.value, event.key, event.time, json.dumps(event.detail)


def from_row(row: Any, where: str) -> Event:
    """What `as_row` gave.

    Raises:
        LedgerError: it is damaged; ``where`` names the row and its store.
    """
    try:
        kind, key, time, detail = row
        return Event(Kind(kind), int(key), float(time), json.loads(detail))
    except (TypeError, ValueError) as error:
        raise LedgerError(
            f"{where} is damaged ({' '.join(str(error).split())}): restore the ledger from a copy; "
            "or move it away, and --resume samples anew what the checkpoint had in flight"
        ) from error
