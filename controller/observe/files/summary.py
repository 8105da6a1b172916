"""The outcome of a run on one page: ``summary.json`` and the table shown at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import read_json, write_json
from paceline.controller.observe.view.text import count, duration, fit_line, percent

RunStatus = Literal["finished", "interrupted", "failed", "solved"]

STATUS_WORDS: Mapping[str, str] = {
    "finished": "finished: all planned steps are done",
    "solved": "solved: no group carries a signal any more",
    "interrupted": "interrupted: saved, continue with --resume",
    "failed": "failed",
}


@dataclass(frozen=True)
class RunSummary:
    """The outcome of a run.

    Accuracies are fractions of the ``num_held_out`` held-out prompts, ``None`` where not measured:
    ``greedy_*`` at temperature 0, ``sampled_*`` at temperature 1; ``standard_errors`` has theirs
    under the same names. ``wall_seconds`` has ``total`` and its parts ``startup``, ``warm_start``,
    ``train``, ``evaluation`` and ``other``; ``tokens`` has ``prompt``, ``completion`` and
    ``trained``; ``groups`` has ``generated``, ``trained`` and ``dropped`` (by reason). ``max_age``
    is the greatest age, in weight versions, of any trained token, ``max_lag`` the bound on it.
    ``error`` is the one-line cause of a failure.
    """

    name: str
    status: RunStatus
    seeds: Mapping[str, int]
    steps: int
    num_held_out: int
    max_lag: int
    max_age: int | None = None
    greedy_before: float | None = None
    greedy_after: float | None = None
    sampled_before: float | None = None
    sampled_after: float | None = None
    standard_errors: Mapping[str, float] = field(default_factory=dict)
    wall_seconds: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    warm_start: Mapping[str, float] | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    error: str | None = None

    def write(self, folder: RunFolder) -> Path:
        """Save as ``summary.json``; return its path."""
        write_json(folder.summary, asdict(self))
        return folder.summary

    @classmethod
    def read(cls, folder: RunFolder) -> Self | None:
        """Return the run's summary, or None where it left none (it still works, or was killed)."""
        content = read_json(folder.summary)
        known = {entry.name for entry in fields(cls)}
        try:
            return cls(**{name: value for name, value in content.items() if name in known})
        except (AttributeError, TypeError):
            return None


def print_summary(
    summary: RunSummary, report: Path | None = None, console: Console | None = None
) -> None:
    """Show the outcome as a table; the last line says where the report is."""
    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in _rows(summary):
        table.add_row(name, value)
    style = {"failed": "bold red", "interrupted": "bold yellow"}.get(summary.status, "bold green")
    console.print()
    console.print(Text.assemble((summary.name, "bold"), "  ", (_status(summary), style)))
    console.print(table)
    if report is not None:
        # soft_wrap keeps the path in one piece, so that it can be clicked or copied.
        console.print(Text.assemble(("report  ", "dim"), str(report)), soft_wrap=True)


def _status(summary: RunSummary) -> str:
    words = STATUS_WORDS.get(summary.status, summary.status)
    return f"{words}: {fit_line(summary.error, 200)}" if summary.error else words


def _rows(summary: RunSummary) -> list[tuple[str, Text]]:
    """Return name and value of each line of the table."""
    groups, dropped = summary.groups, summary.groups.get("dropped") or {}
    rows = [
        ("held-out greedy", _change(summary, "greedy")),
        ("held-out at T=1", _change(summary, "sampled")),
        ("steps", Text(_steps(summary))),
        ("wall time", Text(_wall(summary.wall_seconds))),
        ("tokens", Text(", ".join(f"{count(v)} {k}" for k, v in summary.tokens.items()))),
        (
            "groups",
            Text(f"{count(groups.get('trained'))} trained of {count(groups.get('generated'))}"),
        ),
        ("dropped", Text(", ".join(f"{reason} {count(v)}" for reason, v in dropped.items()))),
        ("policy age", Text(_age(summary))),
        ("seeds", Text(", ".join(f"{k} {v}" for k, v in summary.seeds.items()))),
    ]
    return [(name, value) for name, value in rows if value.plain]


def _change(summary: RunSummary, kind: str) -> Text:
    """Return accuracy before and after with standard errors, nothing where neither was measured."""
    values = [getattr(summary, f"{kind}_{when}") for when in ("before", "after")]
    if values == [None, None]:
        return Text()
    shown = [_with_error(summary, f"{kind}_{when}") for when in ("before", "after")]
    grown = None not in values and values[1] > values[0]
    return Text.assemble(
        f"{shown[0]}  →  ",
        (shown[1], "bold green" if grown else "bold"),
        (f"   ({summary.num_held_out} prompts)", "dim"),
    )


def _with_error(summary: RunSummary, name: str) -> str:
    value, error = getattr(summary, name), summary.standard_errors.get(name)
    if value is None or error is None:
        return percent(value, "not measured")
    return f"{percent(value)} ±{100 * error:.1f}"


def _steps(summary: RunSummary) -> str:
    if not summary.warm_start:
        return f"{summary.steps}"
    return f"{summary.steps} after {summary.warm_start.get('steps', 0):.0f} of warm start"


def _wall(seconds: Mapping[str, float]) -> str:
    parts = [
        f"{name.replace('_', ' ')} {duration(value)}"
        for name, value in seconds.items()
        if name != "total"
    ]
    return duration(seconds.get("total"), "") + (f"  ({', '.join(parts)})" if parts else "")


def _age(summary: RunSummary) -> str:
    if summary.max_age is None:
        return ""
    return f"at most {summary.max_age} of {summary.max_lag} allowed weight versions"
