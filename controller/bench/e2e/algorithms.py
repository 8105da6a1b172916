"""``paceline bench algorithms``: what old samples do to learning, and what corrections undo.

The quick start's task from one initial model a seed: in step (lag 0), and four versions behind with
and without corrections. Only what the configuration says of lag and algorithm differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from paceline.controller.bench.e2e.paceline_runs import make_initial_model, train
from paceline.controller.bench.e2e.workload import SHORT, Workload
from paceline.controller.bench.harness.result import BenchResult, BenchTable, Spread, Target
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import write_atomically
from paceline.controller.observe.files.recorder import read_records
from paceline.controller.observe.files.records import EvaluationRecord
from paceline.controller.observe.files.versions import collect_versions
from paceline.controller.observe.report.comparison import drawing

IN_STEP = "lag 0"
UNCORRECTED = "lag 4, uncorrected"
CLIPPED = "lag 4, clipped ratio"
DECOUPLED = "lag 4, decoupled PPO"
TRUNCATED = "lag 4, TIS"

_CLIP = "{type: clip, clip_low: 0.2, clip_high: 0.28}"
# Groups without signal are kept: their replacements would be of newer weights.
_SHARED = {"algorithm.zero_signal": "keep"}
_GRPO = {
    **_SHARED,
    "algorithm.type": "grpo",
    "algorithm.aggregation": "token_mean",
    "algorithm.loss": _CLIP,
}
# All that the freshness budget allows is sampled at once, so that it is as old as it may be.
_LATE = {"loop.max_lag": "4", "loop.pacing": "false", "rollout.max_num_seqs": "2560"}
VARIANTS: Mapping[str, Mapping[str, str]] = {
    IN_STEP: {"loop.max_lag": "0", **_GRPO},
    UNCORRECTED: {**_LATE, **_SHARED, "algorithm.type": "reinforce"},
    CLIPPED: {**_LATE, **_GRPO},
    DECOUPLED: {
        **_LATE,
        **_SHARED,
        "algorithm.type": "decoupled_ppo",
        "algorithm.loss": _CLIP,
    },
    TRUNCATED: {
        **_LATE,
        **_SHARED,
        "algorithm.type": "reinforce",
        "algorithm.corrections": "[{type: truncate, cap: 2.0}]",
    },
}
CORRECTED = (CLIPPED, DECOUPLED, TRUNCATED)
TOLERANCE = 5.0
"""Points of accuracy that a corrected run may end below lag 0."""


@dataclass(frozen=True)
class Plan:
    """Variants on every seed for ``num_steps`` steps, evaluated every ``evaluate_every``.

    Without ``is_warm`` runs start from random weights: no time for a warm start.
    """

    variants: Sequence[str]
    seeds: Sequence[int]
    num_steps: int
    evaluate_every: int
    num_held_out: int = 256
    is_warm: bool = True


FULL = Plan(tuple(VARIANTS), (0, 1), num_steps=100, evaluate_every=20)
QUICK = Plan((IN_STEP, CLIPPED), (0,), 4, 2, num_held_out=32, is_warm=False)


@dataclass(frozen=True)
class Curve:
    """Greedy accuracy in percent at each evaluated step, and the mean age of what was trained."""

    greedy: Mapping[int, float]
    mean_age: float

    @property
    def last(self) -> float:
        """Accuracy at the end."""
        return self.greedy[max(self.greedy)]


def bench_algorithms(quick: bool, output: Path) -> BenchResult:
    """Train every variant; where ``quick``, two of them for a few steps from random weights.

    Raises:
        BenchError: a run failed.
    """
    plan = QUICK if quick else FULL
    folder = output / "algorithms"
    folder.mkdir(parents=True, exist_ok=True)
    curves = {
        seed: {name: _curve(plan, name, seed, folder) for name in plan.variants}
        for seed in plan.seeds
    }
    for seed, of in curves.items():
        shares = {name: _shares(curve) for name, curve in of.items()}
        title = f"greedy accuracy, seed {seed}"
        write_atomically(folder / f"curves-seed{seed}.svg", drawing(title, shares))
    return _result(plan, curves)


def _shares(curve: Curve) -> dict[int, float]:
    return {step: percent / 100 for step, percent in curve.greedy.items()}


def _workload(plan: Plan, seed: int) -> Workload:
    task = {"data.seed": str(seed), "data.num_held_out": str(plan.num_held_out)}
    return replace(SHORT, name=f"short-seed{seed}", seed=seed, task=task)


def _curve(plan: Plan, name: str, seed: int, folder: Path) -> Curve:
    workload = _workload(plan, seed)
    overrides = {
        **workload.shared_overrides(),
        "warm_start": "null",
        "loop.num_steps": str(plan.num_steps),
        "evaluation.every_steps": str(plan.evaluate_every),
        "evaluation.num_examples": "0",
        "checkpoint.every_steps": "null",
        "observability.live": "false",
        "observability.self_check_steps": "0",
        **VARIANTS[name],
    }
    if plan.is_warm:
        overrides["model.path"] = str(make_initial_model(workload, folder))
        overrides["model.architecture"] = "null"
    run = f"{name.replace(', ', '-').replace(' ', '-').lower()}-seed{seed}"
    steps = train(run, folder, overrides)
    evaluations = [
        record
        for record in read_records(RunFolder(folder / run))
        if isinstance(record, EvaluationRecord) and record.greedy is not None
    ]
    return Curve(
        {record.step: 100 * (record.greedy or 0.0) for record in evaluations},
        fmean(step.age_mean or 0.0 for step in steps),
    )


Curves = Mapping[int, Mapping[str, Curve]]


def _result(plan: Plan, curves: Curves) -> BenchResult:
    below = {
        name: Spread.of(of[IN_STEP].last - of[name].last for of in curves.values())
        for name in plan.variants
        if name != IN_STEP
    }
    targets = {
        f"{name}: points below lag 0 at the end": Target(below[name], "<=", TOLERANCE)
        for name in CORRECTED
        if name in below
    }
    figures: dict[str, Any] = {
        "curves": {
            seed: {name: dict(curve.greedy) for name, curve in of.items()}
            for seed, of in curves.items()
        },
        "mean_age": {
            seed: {name: curve.mean_age for name, curve in of.items()}
            for seed, of in curves.items()
        },
        "points_below_lag_0": {name: spread.median for name, spread in below.items()},
    }
    standard_error = 100 * (0.25 / plan.num_held_out) ** 0.5
    notes = (
        f"Greedy accuracy on {plan.num_held_out} held-out prompts, in percent; a standard error is "
        f"up to {standard_error:.1f} points.",
    )
    return BenchResult(
        "algorithms",
        targets,
        figures,
        {f"seed {index}": seed for index, seed in enumerate(plan.seeds)},
        collect_versions(plan.seeds[0]),
        tuple(_table(plan, seed, of) for seed, of in curves.items()),
        notes,
    )


def _table(plan: Plan, seed: int, curves: Mapping[str, Curve]) -> BenchTable:
    steps = sorted({step for curve in curves.values() for step in curve.greedy})
    rows = [
        (
            name,
            f"{curve.mean_age:.1f}",
            *(f"{curve.greedy[step]:.0f}" if step in curve.greedy else "" for step in steps),
        )
        for name, curve in curves.items()
    ]
    columns = ("variant", "mean age", *(f"step {step}" for step in steps))
    return BenchTable(f"seed {seed}: greedy accuracy", columns, rows)
