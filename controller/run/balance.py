"""`paceline ledger RUN`: what became of every group, and whether the books balance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from paceline.configs.load import load_config
from paceline.controller.ledger.balance import Audit, audit
from paceline.controller.ledger.events import LedgerError
from paceline.controller.ledger.opening import open_store
from paceline.controller.ledger.state import Status
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.summary import RunSummary

MOST_SHOWN = 5
"""Faults that are printed; of more there is the number."""


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


def compare(found: Audit, summary: RunSummary) -> None:
    """Note a fault where a finished run's summary counts other groups than its ledger."""
    told, trained = summary.groups.get("trained"), found.state.balance().trained
    if summary.status == "finished" and found.is_whole and told not in (None, trained):
        found.faults.append(f"summary.json has {told} trained groups, the ledger {trained}")


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
