"""What a benchmark answers: figures, targets met or missed, and what it ran on."""

from __future__ import annotations

import json
import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from paceline.configs.errors import UserError
from paceline.controller.observe.files.jsonl import plain

Comparison = Literal[">=", "<=", ">"]
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt}


class BenchError(UserError):
    """A benchmark cannot run: something it needs is missing, or one of its runs failed."""


@dataclass(frozen=True)
class Spread:
    """Median and range of a figure over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


@dataclass(frozen=True)
class Target:
    """A figure with what is asked of its median: for example 3.4 >= 3."""

    measured: Spread
    comparison: Comparison
    target: float

    @property
    def met(self) -> bool:
        """Whether the median is what was asked for."""
        return bool(_COMPARE[self.comparison](self.measured.median, self.target))

    def as_dict(self) -> dict[str, Any]:
        """The target as JSON."""
        return {
            "value": self.measured.median,
            "range": [self.measured.low, self.measured.high],
            "target": self.target,
            "comparison": self.comparison,
            "met": self.met,
        }


@dataclass(frozen=True)
class BenchTable:
    """One table for people: a row is a label and its cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class BenchResult:
    """What one benchmark measured.

    ``figures`` is free-form JSON that holds everything the tables show, unrounded; ``versions`` and
    ``seeds`` say what it was measured on; ``notes`` are sentences printed under the tables.
    """

    bench: str
    targets: Mapping[str, Target]
    figures: Mapping[str, Any]
    seeds: Mapping[str, int]
    versions: Mapping[str, Any]
    tables: Sequence[BenchTable] = ()
    notes: Sequence[str] = field(default=())

    @property
    def all_met(self) -> bool:
        """Whether every target is met."""
        return all(target.met for target in self.targets.values())

    def as_json(self) -> str:
        """One line of JSON."""
        content = {
            "bench": self.bench,
            "targets": {what: target.as_dict() for what, target in self.targets.items()},
            "figures": self.figures,
            "seeds": self.seeds,
            "versions": self.versions,
        }
        return json.dumps(plain(content))


def show(result: BenchResult, console: Console) -> None:
    """Print the tables, the targets and the notes."""
    for table in result.tables:
        console.print(_rich_table(table))
    console.print(_rich_table(_target_table(result.targets)))
    for note in result.notes:
        console.print(note)


def _target_table(targets: Mapping[str, Target]) -> BenchTable:
    rows = [
        (what, str(t.measured), f"{t.comparison} {t.target:g}", "yes" if t.met else "NO")
        for what, t in targets.items()
    ]
    return BenchTable("targets", ("what", "measured", "wanted", "met"), rows)


def _rich_table(content: BenchTable) -> Table:
    table = Table(title=content.title, title_justify="left")
    for index, column in enumerate(content.columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in content.rows:
        table.add_row(*row)
    return table
