"""``paceline bench async``: training at ``max_lag`` 0 beside 1, 2 and 4, from one initial model.

Same data, same batches, same wall clock; only how far rollouts may run ahead differs. Runs take
turns within a round, each round beginning with another one. What two processes can do at a time on
this machine is measured beside them: where that is hardly more than one does, nothing can be won.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from paceline.configs.load import load_config
from paceline.controller.bench.e2e.paceline_runs import make_initial_model, train
from paceline.controller.bench.e2e.workload import LONG_WIDE, SHORT, Workload
from paceline.controller.bench.harness.result import BenchResult, BenchTable, Spread, Target
from paceline.controller.bench.harness.subprocesses import side_by_side
from paceline.controller.bench.harness.timing import after_warmup
from paceline.controller.ledger.balance import audit
from paceline.controller.ledger.opening import open_store
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.records import StepRecord
from paceline.controller.observe.files.versions import collect_versions

SYNCHRONOUS = 0
JUDGED = 2
"""The lag that the target is for."""
REWARD_STEPS = 5
"""Steps whose mean reward stands for what a run had learned by some time."""
PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class Plan:
    """What is run: every lag once a round, ``num_warmup`` untimed steps of ``num_steps`` first.

    Without ``is_warm`` runs start from random weights: no time for a warm start.
    """

    workload: Workload
    lags: Sequence[int]
    num_rounds: int
    num_steps: int
    num_warmup: int
    is_warm: bool = True


FULL = Plan(LONG_WIDE, (0, 1, 2, 4), num_rounds=3, num_steps=14, num_warmup=4)
QUICK = Plan(SHORT, (0, 2), num_rounds=1, num_steps=8, num_warmup=3, is_warm=False)


@dataclass(frozen=True)
class Measured:
    """Of one run's timed steps: trained samples a second, shares of the step that the learner and
    the engine were idle, mean seconds of the parts, ages of all trained groups, learning curve."""

    samples_per_second: float
    learner_idle: float
    engine_idle: float
    generate: float
    train: float
    ages: Mapping[int, int]
    max_lag: int
    curve: Sequence[tuple[float, float]]

    @property
    def seconds(self) -> float:
        """When its last step ended, counted from the start of training."""
        return self.curve[-1][0]

    def reward_at(self, seconds: float) -> float:
        """Mean reward of the last steps that had ended by then."""
        ended = [reward for end, reward in self.curve if end <= seconds]
        return fmean(ended[-REWARD_STEPS:])


Round = Mapping[int, Measured]


def bench_async(quick: bool, output: Path) -> BenchResult:
    """Measure the long-tailed workload; where ``quick``, a short one from random weights.

    Raises:
        BenchError: a run failed.
    """
    plan = QUICK if quick else FULL
    folder = output / "async"
    folder.mkdir(parents=True, exist_ok=True)
    overrides = _overrides(plan, folder)
    rounds = []
    capacities = []
    for number in range(plan.num_rounds):
        capacities.append(parallel_capacity())
        order = [*plan.lags[number:], *plan.lags[:number]]
        found = {lag: _measure(plan, lag, overrides, folder) for lag in order}
        rounds.append({lag: found[lag] for lag in plan.lags})
    return _result(plan, rounds, Spread.of(capacities))


def parallel_capacity() -> float:
    """How many times the work of one process two of them do at a time, one thread each."""
    alone = sum(side_by_side([_work]))
    return sum(side_by_side([_work] * 2)) / alone


def _work() -> float:
    """Mebibytes hashed a second: work of one core, in its own cache."""
    content = bytes(1 << 20)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < PROBE_SECONDS:
        hashlib.sha256(content).digest()
        count += 1
    return count / PROBE_SECONDS


def _overrides(plan: Plan, folder: Path) -> dict[str, str]:
    """One run's settings but for its lag."""
    settings = plan.workload.training_overrides(plan.num_steps) | {
        # Replacing groups would make generation several times training: nothing to overlap.
        "algorithm.zero_signal": "keep",
    }
    if not plan.is_warm:
        return settings
    model = make_initial_model(plan.workload, folder)
    return settings | {"model.path": str(model), "model.architecture": "null"}


def _measure(plan: Plan, lag: int, overrides: Mapping[str, str], folder: Path) -> Measured:
    name = f"lag-{lag}"
    records = train(name, folder, {**overrides, "loop.max_lag": str(lag)})
    timed = after_warmup(records, plan.num_warmup)
    seconds = sum(_part(record, "step") for record in timed)
    began = records[0].seconds - _part(records[0], "step")

    def share(*parts: str) -> float:
        return sum(_part(record, part) for record in timed for part in parts) / seconds

    trained = sum((r.samples_per_second or 0.0) * _part(r, "step") for r in timed)
    return Measured(
        samples_per_second=trained / seconds,
        learner_idle=share("wait_for_batch", "wait_for_sync"),
        engine_idle=1 - share("generate"),
        generate=share("generate") * seconds / len(timed),
        train=share("train", "optimizer") * seconds / len(timed),
        ages=_ages(folder / name),
        max_lag=lag,
        curve=[(record.seconds - began, record.reward or 0.0) for record in records],
    )


def _ages(run: Path) -> Counter[int]:
    """Groups by their age when they were trained, from the run's ledger."""
    folder = RunFolder.open(run)
    config = load_config(str(folder.config), ())
    store = open_store(config.store, folder.root, config.name, read_only=True)
    with contextlib.closing(store):
        return audit(store).state.ages


def _part(record: StepRecord, name: str) -> float:
    return record.time.get(name) or 0.0


def _result(plan: Plan, rounds: Sequence[Round], capacity: Spread) -> BenchResult:
    ratios = {
        lag: Spread.of(
            r[lag].samples_per_second / r[SYNCHRONOUS].samples_per_second for r in rounds
        )
        for lag in plan.lags
    }
    excess = max(max(m.ages) - m.max_lag for r in rounds for m in r.values())
    equal_time = min(m.seconds for r in rounds for m in r.values())
    targets = {
        f"lag {JUDGED}, samples/s over synchronous": Target(ratios[JUDGED], ">=", 1.4),
        "oldest age less the bound": Target(Spread.of([excess]), "<=", 0),
    }
    synchronous = [r[SYNCHRONOUS] for r in rounds]
    ideal = median((m.generate + m.train) / max(m.generate, m.train) for m in synchronous)
    figures: dict[str, Any] = {
        "parallel_capacity": capacity.median,
        "ideal_ratio_on_whole_cores": ideal,
        "equal_wall_seconds": equal_time,
        "ratio": {lag: ratios[lag].median for lag in plan.lags},
        "runs": [{lag: _figures(m, equal_time) for lag, m in r.items()} for r in rounds],
    }
    notes = (
        f"Two processes do {capacity} times the work of one at a time on this machine; generating "
        f"and training side by side could give {ideal:.2f} times on two whole cores.",
        f"Reward: mean of the last {REWARD_STEPS} steps by {equal_time:.0f} s of training.",
    )
    return BenchResult(
        "async",
        targets,
        figures,
        {"run": plan.workload.seed},
        collect_versions(plan.workload.seed),
        (_table(plan, rounds, ratios, equal_time),),
        notes,
    )


def _table(
    plan: Plan, rounds: Sequence[Round], ratios: Mapping[int, Spread], equal_time: float
) -> BenchTable:
    rows = []
    for lag in plan.lags:
        runs = [r[lag] for r in rounds]
        rows.append(
            (
                str(lag),
                str(Spread.of(m.samples_per_second for m in runs)),
                str(ratios[lag]),
                f"{median(m.learner_idle for m in runs):.0%}",
                f"{median(m.engine_idle for m in runs):.0%}",
                f"{median(m.generate for m in runs):.2f} / {median(m.train for m in runs):.2f}",
                _histogram(runs),
                str(Spread.of(m.reward_at(equal_time) for m in runs)),
            )
        )
    columns = (
        "max_lag",
        "samples/s",
        "over 0",
        "learner idle",
        "engine idle",
        "generate / train, s",
        "groups by age",
        "reward",
    )
    return BenchTable(f"{plan.workload.name}: {plan.workload.description}", columns, rows)


def _histogram(runs: Sequence[Measured]) -> str:
    ages: Counter[int] = Counter()
    for run in runs:
        ages.update(run.ages)
    total = sum(ages.values())
    return ", ".join(f"{age}: {ages[age] / total:.0%}" for age in sorted(ages))


def _figures(measured: Measured, equal_time: float) -> dict[str, Any]:
    return {
        "samples_per_second": measured.samples_per_second,
        "learner_idle": measured.learner_idle,
        "engine_idle": measured.engine_idle,
        "generate_seconds": measured.generate,
        "train_seconds": measured.train,
        "ages": dict(measured.ages),
        "reward_at_equal_time": measured.reward_at(equal_time),
    }
