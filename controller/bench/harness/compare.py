"""The one experiment that every benchmark is: variants beside each other, in interleaved rounds."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from paceline.configs.errors import UserError
from paceline.controller.bench.harness.result import (
    BenchError,
    BenchResult,
    Figures,
    Measured,
    Round,
    Target,
)
from paceline.controller.observe.files.versions import collect_versions

STARTED = time.monotonic()

Measure = Callable[[str, str, int], Figures]
"""Takes a case, a variant and the number of the round, from 0."""


@dataclass(frozen=True)
class Case:
    """A workload, and the variants that are measured on it once a round.

    Those of ``last`` come after the others in every round.
    """

    variants: Sequence[str]
    num_rounds: int
    last: Sequence[str] = ()

    def in_turn(self, number: int) -> list[str]:
        """Return the order of a round: each begins with another variant than the one before."""
        first = [variant for variant in self.variants if variant not in self.last]
        start = number % len(first)
        return [*first[start:], *first[:start], *self.last]


def compare(
    bench: str,
    cases: Mapping[str, Case],
    measure: Measure,
    targets: Sequence[Target],
    *,
    ratios: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    packages: Sequence[str] = (),
    notes: Callable[[Measured], Sequence[str]] = lambda measured: (),
) -> BenchResult:
    """Measure every variant in every round of every case, and judge the targets.

    In a round the cases follow each other, and the variants of a case take turns, so that a machine
    that slows down slows all of them. ``ratios`` name figures, each with the variant to whose the
    table has its ratio. ``packages`` are added to the versions.

    Raises:
        BenchError: a measurement failed; it names the variant.
    """
    load_before = os.getloadavg()[0]
    measured = interleaved(cases, measure)
    versions = collect_versions(seed)
    versions["packages"] |= {package: metadata.version(package) for package in packages}
    versions["load_average_before"] = load_before
    judged = {target.what: target.judge(measured) for target in targets}
    load = f"Load average when it began: {load_before:.1f} on {os.cpu_count()} CPUs."
    return BenchResult(bench, measured, judged, ratios, versions, [*notes(measured), load])


def interleaved(cases: Mapping[str, Case], measure: Measure) -> Measured:
    """Return what ``measure`` gives round by round, saying what is measured now.

    Raises:
        BenchError: as ``compare``.
    """
    rounds: dict[str, list[Round]] = {case: [] for case in cases}
    total = sum(len(case.variants) * case.num_rounds for case in cases.values())
    done = itertools.count(1)
    for number in range(max(case.num_rounds for case in cases.values())):
        for name, case in cases.items():
            if number >= case.num_rounds:
                continue
            found = {}
            for variant in case.in_turn(number):
                where = f"{name}, round {number + 1} of {case.num_rounds}: {variant}"
                progress(f"{next(done)} of {total}: {where}")
                found[variant] = _measured(measure, name, variant, number, where)
            rounds[name].append({variant: found[variant] for variant in case.variants})
    return Measured(rounds)


def progress(text: str) -> None:
    """Print at once what is done now, on standard error: standard output is for the result."""
    sys.stderr.write(f"[{time.monotonic() - STARTED:4.0f} s] {text}\n")
    sys.stderr.flush()


def _measured(measure: Measure, case: str, variant: str, number: int, where: str) -> Figures:
    try:
        return measure(case, variant, number)
    except UserError as error:
        raise BenchError(f"{where}: {error}") from error
    except Exception as error:
        error.add_note(f"while the benchmark measured {where}")
        raise
