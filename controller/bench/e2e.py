"""``paceline bench e2e``: whole training steps of Paceline beside TRL's GRPOTrainer.

Both sides start from the same model and train on the same problems in the same order, with the same
reward, batch, precision, optimiser and loss, one torch thread a process. Runs of the variants are
interleaved in rounds, so that a machine that slows down slows all of them; compared are medians of
the rounds' ratios.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from paceline.controller.bench.paceline_runs import make_initial_model, resolve, train
from paceline.controller.bench.result import BenchResult, BenchTable, Target
from paceline.controller.bench.timing import (
    Spread,
    Window,
    controller_overhead,
    paceline_window,
    peer_window,
)
from paceline.controller.bench.trl_runs import require_trl, train_trl, training_problems
from paceline.controller.bench.workload import LONG, SHORT, Workload
from paceline.controller.observe.versions import collect_versions

PEER = "TRL"
SYNCHRONOUS = "synchronous"
ASYNCHRONOUS = "asynchronous"
DEFAULTS = "defaults"

PACELINE_VARIANTS: Mapping[str, Mapping[str, str]] = {
    SYNCHRONOUS: {"loop.max_lag": "0", "algorithm.zero_signal": "keep"},
    ASYNCHRONOUS: {"loop.max_lag": "1", "algorithm.zero_signal": "keep"},
    DEFAULTS: {"loop.max_lag": "1", "algorithm.zero_signal": "drop"},
}


@dataclass(frozen=True)
class Plan:
    """How much is measured of a workload."""

    workload: Workload
    num_rounds: int
    num_warmup: int
    num_timed: int

    @property
    def num_steps(self) -> int:
        """Optimiser steps of one run."""
        return self.num_warmup + self.num_timed


QUICK = (Plan(SHORT, num_rounds=1, num_warmup=2, num_timed=3),)
FULL = (
    Plan(SHORT, num_rounds=3, num_warmup=2, num_timed=8),
    Plan(LONG, num_rounds=3, num_warmup=2, num_timed=4),
)


@dataclass(frozen=True)
class Round:
    """One run of every variant: their windows, and the synchronous run's controller overhead."""

    windows: Mapping[str, Window]
    overhead: float


def bench_e2e(quick: bool, output: Path) -> BenchResult:
    """Measure the short workload (briefly where ``quick``) and, if not, the long-tailed one too.

    Raises:
        BenchError: TRL is not installed, or a run failed.
    """
    require_trl()
    plans = QUICK if quick else FULL
    rounds = {plan.workload.name: measure(plan, output) for plan in plans}
    return report(plans, rounds)


def measure(plan: Plan, output: Path) -> list[Round]:
    """Run every variant once a round."""
    workload = plan.workload
    model = make_initial_model(workload, output)
    overrides = {
        **workload.training_overrides(plan.num_steps),
        "model.path": str(model),
        "model.architecture": "null",
    }
    num_problems = plan.num_steps * workload.groups_per_step
    problems = training_problems(resolve(overrides), num_problems)

    def run_round(number: int) -> Round:
        folder = output / workload.name / f"round-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        steps = train_trl("trl", folder, workload, model, problems, plan.num_steps)
        windows = {PEER: peer_window(steps, plan.num_warmup)}
        records = {}
        for name, changes in PACELINE_VARIANTS.items():
            records[name] = train(name, folder, {**overrides, **changes})
            windows[name] = paceline_window(
                records[name],
                plan.num_warmup,
                workload.samples_per_group,
                overlapping=name != SYNCHRONOUS,
            )
        return Round(windows, controller_overhead(records[SYNCHRONOUS], plan.num_warmup))

    return [run_round(number) for number in range(plan.num_rounds)]


def report(plans: Sequence[Plan], rounds: Mapping[str, Sequence[Round]]) -> BenchResult:
    """Targets, figures and tables of the rounds of every workload."""
    targets: dict[str, Target] = {}
    tables = []
    for plan in plans:
        name = plan.workload.name
        targets |= {f"{name}: {what}": t for what, t in targets_of(rounds[name]).items()}
        tables.append(_table(plan, rounds[name]))
    first = plans[0].workload
    return BenchResult(
        bench="e2e",
        targets=targets,
        figures={plan.workload.name: _figures(plan, rounds[plan.workload.name]) for plan in plans},
        seeds={plan.workload.name: plan.workload.seed for plan in plans},
        versions={**collect_versions(first.seed), "trl": metadata.version("trl")},
        tables=tables,
        notes=_notes(),
    )


def targets_of(rounds: Sequence[Round]) -> dict[str, Target]:
    """What the issue asks for, each the median of the rounds' own ratios."""
    synchronous = _ratio(rounds, SYNCHRONOUS, PEER)
    defaults = _ratio(rounds, DEFAULTS, PEER)
    asynchronous = _ratio(rounds, ASYNCHRONOUS, SYNCHRONOUS)
    overhead = Spread.of(a_round.overhead for a_round in rounds)
    return {
        "synchronous over TRL, samples/s, equal settings": Target(synchronous.median, ">=", 3.0),
        "defaults over TRL, generated samples/s": Target(defaults.median, ">=", 5.0),
        "overhead of a synchronous step": Target(overhead.median, "<=", 0.15),
        "asynchronous over synchronous, samples/s": Target(asynchronous.median, ">", 1.0),
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
    def row(variant: str) -> tuple[str, ...]:
        windows = [a_round.windows[variant] for a_round in rounds]

        def over_rounds(of: Callable[[Window], float]) -> str:
            return str(Spread.of(of(window) for window in windows))

        others = [window.other for window in windows if window.other is not None]
        return (
            variant,
            over_rounds(lambda w: w.generated_per_second),
            over_rounds(lambda w: w.trained_per_second),
            over_rounds(lambda w: w.seconds),
            over_rounds(lambda w: w.generate),
            over_rounds(lambda w: w.train),
            over_rounds(lambda w: w.sync),
            str(Spread.of(others)) if others else "overlaps",
            over_rounds(lambda w: w.padding_factor),
        )

    columns = (
        "variant",
        "samples/s",
        "trained/s",
        "s/step",
        "generate",
        "train",
        "sync",
        "other",
        "padding",
    )
    workload = plan.workload
    title = (
        f"{workload.name} ({workload.description}): {workload.groups_per_step} prompts x "
        f"{workload.samples_per_group} samples, median (range) of {plan.num_rounds} rounds of "
        f"{plan.num_timed} steps"
    )
    return BenchTable(title, columns, [row(variant) for variant in (PEER, *PACELINE_VARIANTS)])


def _notes() -> list[str]:
    load = os.getloadavg()[0]
    return [
        "Seconds a step: generate, train (forward, backward, optimiser) and sync are busy times; "
        "in asynchronous runs they overlap. padding: tokens computed in training over real ones.",
        f"Load average at the end: {load:.1f} on {os.cpu_count()} CPUs.",
    ]
