"""Events of the journal: one for everything that happens to a group or a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from paceline.configs.errors import UserError
from paceline.configs.vocabulary import Group

SCHEMA = 2
"""Version of what a store holds; a store with another one is refused and left as it is. In 1 the
samples of a group held its prompt's tokens, each."""


class LedgerError(UserError):
    """The ledger cannot be reached or read, or what it says cannot be."""


def require_schema(version: int, name: str) -> None:
    """Check the schema of a store.

    Raises:
        LedgerError: it is not this version's.
    """
    if version != SCHEMA:
        writer = "newer" if version > SCHEMA else "older"
        raise LedgerError(
            f"{name} has schema {version}, this version of Paceline writes {SCHEMA}: continue the "
            f"run with the {writer} version that wrote it, or start it anew under another name"
        )


class Kind(StrEnum):
    """Kinds of events; the comment says what `Event.key` and `Event.detail` are."""

    ADMITTED = "admitted"  # group id; prompt: its id
    CLAIMED = "claimed"  # group id
    RETURNED = "returned"  # group id; reason
    FINISHED = "finished"  # group id; oldest, newest: versions that sampled it
    BATCHED = "batched"  # step; trained, held: ids; dropped, rewards: reason, mean by id
    TRAINED = "trained"  # step; checksum: of the weights it made
    SET_ASIDE = "set_aside"  # group id, finished and not batched; reason it will not be trained
    RESUMED = "resumed"  # step training goes back to; keep_batches: later ones are done again
    SETTLED = "settled"  # step: no checkpoint before it is left; steps before it are final
    SNAPSHOT = "snapshot"  # step; the whole `LedgerState`, in place of all events before


class Event(NamedTuple):
    """One line of the journal.

    ``time`` is in seconds since the epoch; ``detail`` holds JSON values; ``group`` is the finished
    group, whose samples are stored beside the event.
    """

    kind: Kind
    key: int
    time: float
    detail: Mapping[str, Any] = {}
    group: Group | None = None


Row = tuple[str, int, float, Mapping[str, Any]]
"""Kind, key, time and detail of an event: what JSON can hold."""


def as_row(event: Event) -> Row:
    """Return an event without its group."""
    return event.kind.value, event.key, event.time, event.detail


def from_row(row: Any, where: str) -> Event:
    """Return the event of a row that `as_row` gave; its detail may still be JSON.

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
