"""Results of checks, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from paceline.controller.observe.files.jsonl import plain
from paceline.controller.verify.checks.distribution import SUSPICIOUS, ChiSquare


@dataclass(frozen=True)
class CheckResult:
    """One law, held against one drafter; ``faults`` are the ways in which it is broken.

    ``compared`` says what was held against what; ``comparisons`` are the statistics;
    ``logprob_error`` is the largest distance of a reported log-probability from the model's.
    """

    check: str
    drafter: str
    compared: str
    num_tokens: int
    num_drafted: int = 0
    num_accepted: int = 0
    comparisons: Sequence[ChiSquare] = ()
    logprob_error: float | None = None
    faults: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        """True where no fault was found."""
        return not self.faults


@dataclass(frozen=True)
class Verification:
    """All results of one run; ``figures`` say what it was run on and how long it took."""

    name: str
    results: Sequence[CheckResult]
    figures: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """True where every check passed, and there were any."""
        return bool(self.results) and all(result.passed for result in self.results)

    @property
    def false_alarms(self) -> float:
        """Probability, at most, that a right sampler fails a run of so many comparisons."""
        return SUSPICIOUS * max(1, self.num_comparisons)

    @property
    def num_comparisons(self) -> int:
        """Statistics that were looked at."""
        return sum(len(result.comparisons) for result in self.results)

    def as_json(self) -> str:
        """Return one line of JSON."""
        content = {
            "verify": self.name,
            "passed": self.passed,
            "num_comparisons": self.num_comparisons,
            "false_alarms": self.false_alarms,
            "results": [asdict(result) | {"passed": result.passed} for result in self.results],
            "figures": self.figures,
        }
        return json.dumps(plain(content))


COLUMNS = ("check", "drafted by", "tokens", "drafted", "accepted", "p", "log-p", "")


def show(verification: Verification, console: Console) -> None:
    """Print one row a result, what is wrong, and how far the answer can be trusted.

    ``p`` is the lowest probability of a result's comparisons, ``log-p`` its largest error of a
    log-probability.
    """
    table = Table(
        title=f"verify {verification.name}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for result in verification.results:
        table.add_row(*_cells(result))
    console.print(table)
    for result in verification.results:
        for fault in result.faults:
            console.print(f"{result.check}, drafted by {result.drafter}: {fault}", style="red")
    console.print(
        f"{verification.num_comparisons} comparisons; one below {SUSPICIOUS:g} fails the run, "
        f"which happens to a right sampler once in {1 / verification.false_alarms:,.0f} runs."
    )


def _cells(result: CheckResult) -> tuple[str, ...]:
    least = min((found.probability for found in result.comparisons), default=None)
    return (
        result.check,
        result.drafter,
        f"{result.num_tokens:,}",
        f"{result.num_drafted:,}" if result.num_drafted else "",
        f"{result.num_accepted:,}" if result.num_drafted else "",
        "" if least is None else f"{least:.1g}",
        "" if result.logprob_error is None else f"{result.logprob_error:.0e}",
        "ok" if result.passed else "WRONG",
    )
