"""What a benchmark answers: figures of variants by round, and targets met or missed."""

from __future__ import annotations

import json
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from paceline.configs.errors import UserError
from paceline.controller.observe.files.jsonl import plain

Comparison = Literal[">=", "<=", ">"]
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt}

Figures = Mapping[str, float | None]
"""What one measurement of a variant gave, by name; None where a figure does not apply."""

Round = Mapping[str, Figures]
"""Figures by variant."""


class BenchError(UserError):
    """Failure of a benchmark: something it needs is missing, or one of its runs failed."""


@dataclass(frozen=True)
class Spread:
    """Median and range of a figure over rounds; not a number where nothing was measured."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of some values."""
        ordered = sorted(values) or [float("nan")]
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


@dataclass(frozen=True)
class Measured:
    """Rounds by case: a case is a workload that every variant is measured on, once a round."""

    rounds: Mapping[str, Sequence[Round]]

    def values(self, case: str, variant: str, figure: str) -> list[float]:
        """Return the figure in each round that has it."""
        found = (each.get(variant, {}).get(figure) for each in self.rounds.get(case, ()))
        return [value for value in found if value is not None]

    def ratios(self, case: str, variant: str, over: str, figure: str) -> list[float]:
        """Return the figure over another variant's in the same round."""
        return [one / other for one, other in self._pairs(case, variant, over, figure)]

    def differences(self, case: str, variant: str, less: str, figure: str) -> list[float]:
        """Return the figure less another variant's in the same round."""
        return [one - other for one, other in self._pairs(case, variant, less, figure)]

    def _pairs(self, case: str, one: str, other: str, figure: str) -> Iterable[tuple[float, float]]:
        for each in self.rounds.get(case, ()):
            pair = [each.get(variant, {}).get(figure) for variant in (one, other)]
            if pair[0] is not None and pair[1] is not None:
                yield pair[0], pair[1]


@dataclass(frozen=True)
class Target:
    """Demand on the median of some values, for example of a ratio in each round.

    A target without values, as where a peer is not installed, is missed.
    """

    what: str
    comparison: Comparison
    target: float
    values: Callable[[Measured], Iterable[float]]

    def judge(self, measured: Measured) -> Judged:
        """Hold what was measured against the target."""
        return Judged(Spread.of(self.values(measured)), self.comparison, self.target)


@dataclass(frozen=True)
class Judged:
    """A spread beside what is asked of its median: for example 3.4 >= 3."""

    measured: Spread
    comparison: Comparison
    target: float

    @property
    def met(self) -> bool:
        """True where the median is what was asked for."""
        return bool(_COMPARE[self.comparison](self.measured.median, self.target))

    def as_dict(self) -> dict[str, Any]:
        """Return the target as JSON."""
        return {
            "value": self.measured.median,
            "range": [self.measured.low, self.measured.high],
            "target": self.target,
            "comparison": self.comparison,
            "met": self.met,
        }


@dataclass(frozen=True)
class BenchResult:
    """Result of one benchmark.

    ``ratios`` name figures, each with the variant to whose the table has its ratio. ``versions``
    say what it was measured on, the seed among them; ``notes`` are printed under the tables.
    """

    bench: str
    measured: Measured
    targets: Mapping[str, Judged]
    ratios: Sequence[tuple[str, str]]
    versions: Mapping[str, Any]
    notes: Sequence[str] = ()

    @property
    def all_met(self) -> bool:
        """True where every target is met."""
        return all(target.met for target in self.targets.values())

    def as_json(self) -> str:
        """Return one line of JSON."""
        content = {
            "bench": self.bench,
            "targets": {what: target.as_dict() for what, target in self.targets.items()},
            "figures": self.measured.rounds,
            "notes": self.notes,
            "versions": self.versions,
        }
        return json.dumps(plain(content))


def show(result: BenchResult, console: Console) -> None:
    """Print medians and ranges of each case, the targets and the notes."""
    for case in result.measured.rounds:
        console.print(_case_table(result, case))
    table = _table("targets", ("what", "measured", "wanted", "met"))
    for what, each in result.targets.items():
        wanted = f"{each.comparison} {each.target:g}"
        table.add_row(what, str(each.measured), wanted, "yes" if each.met else "NO")
    console.print(table)
    for note in result.notes:
        console.print(note)


def _case_table(result: BenchResult, case: str) -> Table:
    rounds = result.measured.rounds[case]
    variants = rounds[0]
    everything = [figures for each in rounds for figures in each.values()]
    figures = list(dict.fromkeys(name for each in everything for name in each))
    ratios = [(name, over) for name, over in result.ratios if name in figures and over in variants]
    columns = ["variant", *figures, *(f"{name}, times {over}" for name, over in ratios)]
    table = _table(f"{case}: median (range) of {len(rounds)} rounds", columns)
    for variant in variants:
        found = [result.measured.values(case, variant, name) for name in figures]
        found += [result.measured.ratios(case, variant, over, name) for name, over in ratios]
        table.add_row(variant, *(str(Spread.of(values)) if values else "-" for values in found))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table
