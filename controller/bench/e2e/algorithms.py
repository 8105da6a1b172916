"""``paceline bench algorithms``: what old samples do to learning, and what corrections undo.

The quick start's task from one initial model a seed: in step (lag 0), and four versions behind with
and without corrections. Only what the configuration says of lag and algorithm differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

from paceline.controller.bench.e2e.paceline_runs import initial_model, train
from paceline.controller.bench.e2e.workload import SHORT
from paceline.controller.bench.harness.compare import Case, compare
from paceline.controller.bench.harness.result import BenchResult, Figures, Measured, Target
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import write_atomically
from paceline.controller.observe.files.recorder import read_records
from paceline.controller.observe.files.records import EvaluationRecord, StepRecord
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
ACCURACY, AT_THE_END = "greedy accuracy, a round a seed", "at the end"
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


def bench_algorithms(quick: bool, output: Path) -> BenchResult:
    """Train every variant; where ``quick``, two of them for a few steps from random weights.

    Rounds are seeds.

    Raises:
        BenchError: a run failed.
    """
    plan = QUICK if quick else FULL
    folder = output / "algorithms"
    result = compare(
        "algorithms",
        {ACCURACY: Case(plan.variants, len(plan.seeds))},
        lambda _, variant, number: measure(plan, variant, plan.seeds[number], folder),
        targets_of(plan.variants),
        seed=plan.seeds[0],
        notes=lambda measured: [standard_error(plan.num_held_out)],
    )
    for seed, found in zip(plan.seeds, result.measured.rounds[ACCURACY], strict=True):
        shares = {name: _shares(plan, figures) for name, figures in found.items()}
        picture = drawing(f"greedy accuracy, seed {seed}", shares)
        write_atomically(folder / f"curves-seed{seed}.svg", picture)
    return result


def targets_of(variants: Sequence[str]) -> list[Target]:
    """Return what is asked of the corrected ones, at the end: to be hardly below lag 0."""

    def below(variant: str, measured: Measured) -> list[float]:
        return measured.differences(ACCURACY, IN_STEP, variant, AT_THE_END)

    return [
        Target(f"{name}: points below lag 0 at the end", "<=", TOLERANCE, partial(below, name))
        for name in CORRECTED
        if name in variants
    ]


def measure(plan: Plan, name: str, seed: int, folder: Path) -> Figures:
    """Train a variant on a seed."""
    task = {"data.seed": str(seed), "data.num_held_out": str(plan.num_held_out)}
    workload = replace(SHORT, name=f"short-seed{seed}", seed=seed, task=task)
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
        **(initial_model(workload, folder) if plan.is_warm else {}),
    }
    run = f"{name.replace(', ', '-').replace(' ', '-').lower()}-seed{seed}"
    return figures_of(folder / run, train(run, folder, overrides))


def figures_of(run: Path, steps: Sequence[StepRecord]) -> Figures:
    """Return greedy accuracy in percent at each evaluated step, and at the end, and the mean age of
    what was trained."""
    greedy = {
        record.step: 100 * record.greedy
        for record in read_records(RunFolder(run))
        if isinstance(record, EvaluationRecord) and record.greedy is not None
    }
    return {
        "mean age": fmean(step.age_mean or 0.0 for step in steps),
        **{f"step {step}": accuracy for step, accuracy in greedy.items()},
        AT_THE_END: greedy[max(greedy)],
    }


def standard_error(num_held_out: int) -> str:
    """Say how exact accuracies are."""
    points = 100 * (0.25 / num_held_out) ** 0.5
    return (
        f"Greedy accuracy on {num_held_out} held-out prompts, in percent; a standard error is up "
        f"to {points:.1f} points."
    )


def _shares(plan: Plan, figures: Figures) -> dict[int, float]:
    found = {step: figures.get(f"step {step}") for step in range(plan.num_steps + 1)}
    return {step: accuracy / 100 for step, accuracy in found.items() if accuracy is not None}
