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
from paceline.controller.observe.folder import RunFolder

STORED = (Status.FINISHED, Status.BATCHED, Status.TRAINED)
"""Where a group stands whose samples must be there."""


@dataclass
class Audit:
    """A journal read from end to end: its state, what happened how often, and what is wrong."""

    state: LedgerState = field(default_factory=LedgerState)
    events: Counter[Kind] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    began: float | None = None
    ended: float | None = None

    def follow(self, event: Event) -> None:
        """Take an event in.

        Raises:
            LedgerError: it cannot follow what came before.
        """
        if event.kind is Kind.SNAPSHOT and self.events:
            self._compare(event)
        else:
            self.state.apply(event)
        self.events[event.kind] += 1
        self.began = event.time if self.began is None else self.began
        self.ended = event.time

    def _compare(self, event: Event) -> None:
        """A snapshot must say what all events before it add up to."""
        if json.loads(json.dumps(self.state.as_dict())) != event.detail:
            self.faults.append(f"the snapshot at step {event.key} differs from the events before")
        self.state = LedgerState.from_dict(event.detail)


def audit(store: Store) -> Audit:
    """Read a store's journal, and look for the samples that must be there."""
    result = Audit()
    stored = store.group_ids()  # before the events: what is finished meanwhile is no fault
    try:
        for event in store.history(whole=True):
            result.follow(event)
    except LedgerError as error:
        result.faults.append(str(error))
    missing = set(result.state.with_status(*STORED)) - stored - store.group_ids()
    if missing:
        result.faults.append(
            f"the samples of {len(missing)} finished groups are missing, those of group "
            f"{min(missing)} among them"
        )
    if count := result.state.balance().missing:
        result.faults.append(f"{count} groups are unaccounted for")
    return result


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
    console = Console()
    console.print(_table(found, config.name))
    for fault in found.faults:
        console.print(f"[red]fault[/]: {fault}", soft_wrap=True, highlight=False)
    balance = found.state.balance()
    pending, dropped = sum(balance.pending.values()), sum(balance.dropped.values())
    console.print(
        f"{balance.admitted} admitted = {balance.trained} trained + {dropped} dropped + {pending} "
        f"pending: {'NOT IN ORDER' if found.faults else 'balanced'}",
        highlight=False,
    )
    return not found.faults


def _table(found: Audit, name: str) -> Table:
    table = Table(title=f"ledger of {name}", title_justify="left", box=None, show_header=False)
    for label, value in _lines(found):
        table.add_row(label, value)
    return table


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
