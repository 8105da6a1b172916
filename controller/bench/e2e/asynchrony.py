"""``paceline bench async``: training at ``max_lag`` 0 beside 1, 2 and 4, from one initial model.

Same data, same batches, same wall clock; only how far rollouts may run ahead differs. What two
processes can do at a time on this machine is measured beside them: where that is hardly more than
one does, nothing can be won.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from paceline.configs.load import load_config
from paceline.controller.bench.e2e.paceline_runs import initial_model, train
from paceline.controller.bench.e2e.step_times import after_warmup, paceline_figures, total
from paceline.controller.bench.e2e.workload import LONG_WIDE, SHORT, Workload
from paceline.controller.bench.harness.compare import Case, compare
from paceline.controller.bench.harness.result import BenchResult, Figures, Measured, Spread, Target
from paceline.controller.bench.harness.subprocesses import side_by_side
from paceline.controller.ledger.balance import audit
from paceline.controller.ledger.opening import open_store
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.records import StepRecord

LAGS: Mapping[str, int] = {f"lag {lag}": lag for lag in (0, 1, 2, 4)}
SYNCHRONOUS, JUDGED = "lag 0", "lag 2"
MACHINE, PROBE = "this machine", "two processes at a time"
REWARD_STEPS = 5
"""Steps whose mean reward stands for what a run had learned by some time."""
PROBE_SECONDS = 2.0
BEYOND = "oldest age less the bound"

Curve = Sequence[tuple[float, float]]
"""Of each step: when it ended, in seconds from the start of training, and its mean reward."""


@dataclass(frozen=True)
class Plan:
    """Runs of every lag once a round; the first ``num_warmup`` of ``num_steps`` are not timed.

    Without ``is_warm`` runs start from random weights: no time for a warm start.
    """

    workload: Workload
    lags: Sequence[str]
    num_rounds: int
    num_steps: int
    num_warmup: int
    is_warm: bool = True


FULL = Plan(LONG_WIDE, tuple(LAGS), num_rounds=3, num_steps=14, num_warmup=4)
QUICK = Plan(
    replace(SHORT, groups_per_step=16, description=f"{SHORT.description}; 16 prompts a step"),
    (SYNCHRONOUS, JUDGED),
    num_rounds=1,
    num_steps=6,
    num_warmup=2,
    is_warm=False,
)


def bench_async(quick: bool, output: Path) -> BenchResult:
    """Measure the long-tailed workload; where ``quick``, a short one from random weights.

    Raises:
        BenchError: a run failed.
    """
    plan = QUICK if quick else FULL
    folder = output / "async"
    folder.mkdir(parents=True, exist_ok=True)
    start = start_of(plan, folder)
    curves: dict[str, list[Curve]] = {lag: [] for lag in plan.lags}
    name = plan.workload.name

    def measure_either(case: str, variant: str, number: int) -> Figures:
        if case == MACHINE:
            return {"times the work of one": parallel_capacity()}
        figures, curve = measure(plan, variant, start, folder)
        curves[variant].append(curve)
        return figures

    return compare(
        "async",
        {MACHINE: Case([PROBE], plan.num_rounds), name: Case(plan.lags, plan.num_rounds)},
        measure_either,
        targets_of(name, plan.lags),
        ratios=[("trained/s", SYNCHRONOUS)],
        seed=plan.workload.seed,
        notes=lambda measured: [f"{name}: {plan.workload.description}", reward_note(curves)],
    )


def targets_of(case: str, lags: Sequence[str]) -> list[Target]:
    """Return what is asked: speed at one lag, and no age above the bound at any."""

    def faster(measured: Measured) -> list[float]:
        return measured.ratios(case, JUDGED, SYNCHRONOUS, "trained/s")

    def beyond(measured: Measured) -> list[float]:
        return [max(value for lag in lags for value in measured.values(case, lag, BEYOND))]

    return [
        Target(f"{JUDGED}, samples/s over synchronous", ">=", 1.4, faster),
        Target(BEYOND, "<=", 0, beyond),
    ]


def parallel_capacity() -> float:
    """Return how many times the work of one process two do at a time, one thread each."""
    alone = sum(side_by_side([_work]))
    return sum(side_by_side([_work] * 2)) / alone


def _work() -> float:
    """Return the mebibytes hashed a second: work of one core, in its own cache."""
    content = bytes(1 << 20)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < PROBE_SECONDS:
        hashlib.sha256(content).digest()
        count += 1
    return count / PROBE_SECONDS


def start_of(plan: Plan, folder: Path) -> Mapping[str, str]:
    """Return one run's settings but for its lag."""
    # Replacing groups would make generation several times training: nothing to overlap.
    keep = {"algorithm.zero_signal": "keep"}
    model = initial_model(plan.workload, folder) if plan.is_warm else {}
    return {**plan.workload.training_overrides(plan.num_steps), **keep, **model}


def measure(
    plan: Plan, variant: str, start: Mapping[str, str], folder: Path
) -> tuple[Figures, Curve]:
    """Run one lag in ``folder``."""
    name = variant.replace(" ", "-")
    records = train(name, folder, {**start, "loop.max_lag": str(LAGS[variant])})
    began = records[0].seconds - total(records[:1], "step")
    curve = [(record.seconds - began, record.reward or 0.0) for record in records]
    return figures_of(plan, variant, records, ages_of(folder / name)), curve


def figures_of(
    plan: Plan, variant: str, records: Sequence[StepRecord], ages: Mapping[int, int]
) -> Figures:
    """Return those of the timed steps, shares of the step that the learner and the engine were
    idle, how many times as fast whole cores for each could be, and the ages of all trained groups.
    """
    timed = after_warmup(records, plan.num_warmup)
    seconds = total(timed, "step")
    parts = total(timed, "generate"), total(timed, "train", "optimizer")
    is_synchronous = LAGS[variant] == 0
    return {
        **paceline_figures(
            records, plan.num_warmup, plan.workload.samples_per_group, not is_synchronous
        ),
        "learner idle": total(timed, "wait_for_batch", "wait_for_sync") / seconds,
        "engine idle": 1 - parts[0] / seconds,
        "ideal ratio": sum(parts) / max(parts) if is_synchronous else None,
        **{f"age {age}": ages[age] / sum(ages.values()) for age in sorted(ages)},
        BEYOND: max(ages) - LAGS[variant],
    }


def ages_of(run: Path) -> Mapping[int, int]:
    """Return the number of groups by their age when they were trained, from the run's ledger."""
    folder = RunFolder.open(run)
    config = load_config(str(folder.config), ())
    store = open_store(config.store, folder.root, config.name, read_only=True)
    with contextlib.closing(store):
        return audit(store).state.ages


def reward_note(curves: Mapping[str, Sequence[Curve]]) -> str:
    """Say what each lag had learned when the first run of all was over."""
    seconds = min(curve[-1][0] for each in curves.values() for curve in each)
    rewards = {
        lag: Spread.of(reward_at(curve, seconds) for curve in each) for lag, each in curves.items()
    }
    told = "; ".join(f"{lag}: {reward}" for lag, reward in rewards.items())
    return f"Reward, mean of the last {REWARD_STEPS} steps by {seconds:.0f} s of training: {told}."


def reward_at(curve: Curve, seconds: float) -> float:
    """Return the mean reward of the last steps that had ended by then."""
    ended = [reward for end, reward in curve if end <= seconds]
    return fmean(ended[-REWARD_STEPS:])
