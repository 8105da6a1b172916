"""From the rounds of the end-to-end benchmark to its targets, figures and tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from paceline.controller.bench.e2e.workload import Workload
from paceline.controller.bench.harness.result import BenchResult, BenchTable, Spread, Target
from paceline.controller.bench.harness.timing import Window
from paceline.controller.observe.files.versions import collect_versions

PEER = "TRL"
PEER_ON_ALL_CORES = "TRL, 2 threads"
SYNCHRONOUS = "synchronous"
ASYNCHRONOUS = "asynchronous"
DEFAULTS = "defaults"

_COLUMNS: Mapping[str, Callable[[Window], float | None]] = {
    "samples/s": lambda window: window.generated_per_second,
    "trained/s": lambda window: window.trained_per_second,
    "s/step": lambda window: window.seconds,
    "generate": lambda window: window.generate,
    "train": lambda window: window.train,
    "sync": lambda window: window.sync,
    "other": lambda window: window.other,
    "padding": lambda window: window.padding_factor,
}


@dataclass(frozen=True)
class Plan:
    """How much is measured of a workload.

    ``peer_threads`` are the peer's variants with their torch threads. Targets are against ``PEER``,
    with a thread a process as Paceline's processes have; the other variant shows what the peer
    makes of a second core, which asynchronous Paceline uses too.
    """

    workload: Workload
    num_rounds: int
    num_warmup: int
    num_timed: int
    peer_threads: Mapping[str, int]

    @property
    def num_steps(self) -> int:
        """Optimiser steps of one run."""
        return self.num_warmup + self.num_timed


@dataclass(frozen=True)
class Round:
    """One run of every variant: their windows, and the synchronous run's controller overhead."""

    windows: Mapping[str, Window]
    overhead: float


def report(measured: Sequence[tuple[Plan, Sequence[Round]]], load_before: float) -> BenchResult:
    """Targets, figures and tables; ``load_before`` is the machine's load average at the start."""
    targets = {
        f"{plan.workload.name}: {what}": target
        for plan, rounds in measured
        for what, target in targets_of(rounds).items()
    }
    seeds = {plan.workload.name: plan.workload.seed for plan, _ in measured}
    figures = {plan.workload.name: _figures(plan, rounds) for plan, rounds in measured}
    return BenchResult(
        bench="e2e",
        targets=targets,
        figures={**figures, "load_average_before": load_before},
        seeds=seeds,
        versions={**collect_versions(max(seeds.values())), "trl": metadata.version("trl")},
        tables=[_table(plan, rounds) for plan, rounds in measured],
        notes=[
            "Seconds a step: generate, train (forward, backward, optimiser) and sync are busy "
            "times; in asynchronous runs they overlap.",
            "padding: tokens computed in training over real ones.",
            f"Load average when it began: {load_before:.1f} on {os.cpu_count()} CPUs.",
        ],
    )


def targets_of(rounds: Sequence[Round]) -> dict[str, Target]:
    """What is asked of the product, each the median of the rounds' own ratios."""
    synchronous = _ratio(rounds, SYNCHRONOUS, PEER)
    defaults = _ratio(rounds, DEFAULTS, PEER)
    asynchronous = _ratio(rounds, ASYNCHRONOUS, SYNCHRONOUS)
    overhead = Spread.of(a_round.overhead for a_round in rounds)
    return {
        "synchronous over TRL, samples/s, equal settings": Target(synchronous, ">=", 3.0),
        "defaults over TRL, generated samples/s": Target(defaults, ">=", 5.0),
        "overhead of a synchronous step": Target(overhead, "<=", 0.15),
        "asynchronous over synchronous, samples/s": Target(asynchronous, ">", 1.0),
    }


def _ratio(rounds: Sequence[Round], over: str, under: str) -> Spread:
    """Generated samples a second of one variant over another's, in the same round."""
    return Spread.of(
        r.windows[over].generated_per_second / r.windows[under].generated_per_second for r in rounds
    )


def _figures(plan: Plan, rounds: Sequence[Round]) -> dict[str, Any]:
    return {
        "description": plan.workload.description,
        "groups_per_step": plan.workload.groups_per_step,
        "samples_per_group": plan.workload.samples_per_group,
        "warmup_steps": plan.num_warmup,
        "timed_steps": plan.num_timed,
        "rounds": [
            {
                "variants": {name: window.as_dict() for name, window in r.windows.items()},
                "synchronous_overhead": r.overhead,
            }
            for r in rounds
        ],
    }


def _table(plan: Plan, rounds: Sequence[Round]) -> BenchTable:
    workload = plan.workload
    title = (
        f"{workload.name} ({workload.description}): {workload.groups_per_step} prompts x "
        f"{workload.samples_per_group} samples, median (range) of {plan.num_rounds} rounds of "
        f"{plan.num_timed} steps"
    )
    rows = [
        (variant, *(_cell(column, variant, rounds) for column in _COLUMNS.values()))
        for variant in rounds[0].windows
    ]
    return BenchTable(title, ("variant", *_COLUMNS), rows)


def _cell(column: Callable[[Window], float | None], variant: str, rounds: Sequence[Round]) -> str:
    values = [column(a_round.windows[variant]) for a_round in rounds]
    measured = [value for value in values if value is not None]
    return str(Spread.of(measured)) if measured else "overlaps"
