"""`paceline ledger RUN`: what became of every group, and whether the books balance."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from paceline.configs.load import load_config
from paceline.controller.ledger.events import Event, Kind, LedgerError
from paceline.controller.ledger.opening import open_store
from paceline.controller.ledger.state import LedgerState, Status
from paceline.controller.ledger.store import Store
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.summary import RunSummary

STORED = (Status.FINISHED, Status.BATCHED, Status.TRAINED)
"""Where a group stands whose samples must be there."""
MOST_SHOWN = 5
"""Faults that are printed; of more there is the number."""


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
        """A snapshot must say what all events before it add up to."""
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


def compare(found: Audit, summary: RunSummary) -> None:
    """Note a fault where a finished run's summary counts other groups than its ledger."""
    told, trained = summary.groups.get("trained"), found.state.balance().trained
    if summary.status == "finished" and found.is_whole and told not in (None, trained):
        found.faults.append(f"summary.json has {told} trained groups, the ledger {trained}")


def print_ledger(root: Path) -> bool:
    """Print the balance of the run in a folder; whether it is in order.

    Raises:
        UserError: it is no run, or its store cannot be opened.
    """
    folder = RunFolder.open(root)
    config = load_config(str(folder.config), ())
    if config.store.type == "memory":
        raise LedgerError(f"{root} kept its ledger in memory (store.type memory): it is gone")
    store = open_store(config.store, folder.root, config.name, read_only=True)
    with contextlib.closing(store):
        found = audit(store)
    if (summary := RunSummary.read(folder)) is not None:
        compare(found, summary)
    _show(found, config.name)
    return not found.faults


def _show(found: Audit, name: str) -> None:
    console = Console()
    table = Table(title=f"ledger of {name}", title_justify="left", box=None, show_header=False)
    for label, value in _lines(found):
        table.add_row(label, value)
    console.print(table)
    for fault in found.faults[:MOST_SHOWN]:
        console.print("[red]fault[/]:", fault, soft_wrap=True, highlight=False)
    if (more := len(found.faults) - MOST_SHOWN) > 0:
        console.print(f"[red]fault[/]: and {more} more", highlight=False)
    balance = found.state.balance()
    pending, dropped = sum(balance.pending.values()), sum(balance.dropped.values())
    console.print(
        f"{balance.admitted} admitted = {balance.trained} trained + {dropped} dropped + {pending} "
        f"pending: {'NOT IN ORDER' if found.faults else 'balanced'}",
        highlight=False,
    )


def _lines(found: Audit) -> Iterator[tuple[str, str]]:
    state, balance = found.state, found.state.balance()
    yield "admitted", str(balance.admitted)
    revocable = len(state.with_status(Status.TRAINED))
    since = f" ({revocable} since the oldest checkpoint)" if revocable else ""
    yield "trained", f"{balance.trained} groups in {state.step} steps{since}"
    yield "dropped", _counts(balance.dropped) or "0"
    yield "pending", _counts(balance.pending) or "0"
    yield "age at training", _counts({f"{age}": n for age, n in sorted(state.ages.items())})
    yield "claims given back", str(state.returned)
    yield "resumed", f"{state.resumed} times"
    if state.diverged:
        yield "done again with other weights", f"steps {state.diverged}"
    if found.began is not None and found.ended is not None:
        yield "span", f"{found.ended - found.began:.0f} s"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
