"""Audit of a ledger: what became of every group, and whether its counts balance."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

from paceline.controller.ledger.events import Event, Kind, LedgerError
from paceline.controller.ledger.state import LedgerState, Status
from paceline.controller.ledger.store import Store

STORED = (Status.FINISHED, Status.BATCHED, Status.TRAINED)
"""Statuses of a group whose samples must be there."""


@dataclass
class Audit:
    """A journal read from end to end: its state, what happened how often, and what is wrong.

    ``is_whole`` says that it goes back to the run's first group, as Redis's does not once it was
    trimmed.
    """

    state: LedgerState = field(default_factory=LedgerState)
    events: Counter[Kind] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    is_whole: bool = False
    began: float | None = None
    ended: float | None = None

    def follow(self, event: Event) -> None:
        """Take an event in.

        Raises:
            LedgerError: it cannot follow what came before.
        """
        if self.began is None:
            self.began, self.is_whole = event.time, event.kind is not Kind.SNAPSHOT
        elif event.kind is Kind.SNAPSHOT:
            self._compare(event)
        self.state.apply(event)
        self.events[event.kind] += 1
        self.ended = event.time

    def _compare(self, snapshot: Event) -> None:
        """Require that a snapshot says what all events before it add up to."""
        if json.loads(json.dumps(self.state.as_dict())) != snapshot.detail:
            self.faults.append(f"the snapshot at step {snapshot.key} differs from what came before")


def audit(store: Store) -> Audit:
    """Read a store's journal and the samples that must be there; the store may be written.

    A run that is going on may forget samples while they are looked for. What is really wrong is
    wrong at a second look too.
    """
    first = _look(store)
    if not first.faults:
        return first
    second = _look(store)
    second.faults = [fault for fault in second.faults if fault in set(first.faults)]
    return second


def _look(store: Store) -> Audit:
    found = Audit()
    try:
        for event in store.history(whole=True):
            found.follow(event)
    except LedgerError as error:
        found.faults.append(str(error))
        return found  # where a group stood after that is unknown
    for group_id in found.state.with_status(*STORED):
        try:
            store.verify(group_id)
        except LedgerError as error:
            found.faults.append(str(error))
    if count := found.state.balance().missing:
        found.faults.append(f"{count} groups are unaccounted for")
    return found
