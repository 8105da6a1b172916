"""``paceline bench e2e``: whole training steps of Paceline beside TRL's GRPOTrainer.

Both sides start from the same model and train on the same problems in the same order, with the same
reward, batch, precision, optimiser and loss, one torch thread a process. Runs of the variants are
interleaved in rounds, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.controller.bench.e2e.paceline_runs import make_initial_model, resolve, train
from paceline.controller.bench.e2e.report import (
    ASYNCHRONOUS,
    DEFAULTS,
    PEER,
    PEER_ON_ALL_CORES,
    SYNCHRONOUS,
    Plan,
    Round,
    report,
)
from paceline.controller.bench.e2e.trl_job import Problem
from paceline.controller.bench.e2e.trl_runs import require_trl, train_trl, training_problems
from paceline.controller.bench.e2e.workload import LONG, SHORT
from paceline.controller.bench.harness.result import BenchResult
from paceline.controller.bench.harness.timing import (
    controller_overhead,
    paceline_window,
    peer_window,
)

PACELINE_VARIANTS: Mapping[str, Mapping[str, str]] = {
    SYNCHRONOUS: {"loop.max_lag": "0", "algorithm.zero_signal": "keep"},
    ASYNCHRONOUS: {"algorithm.zero_signal": "keep"},
    DEFAULTS: {},
}

_ONE, _BOTH = {PEER: 1}, {PEER: 1, PEER_ON_ALL_CORES: 2}
QUICK = (Plan(SHORT, num_rounds=1, num_warmup=3, num_timed=3, peer_threads=_ONE),)
FULL = (
    Plan(SHORT, num_rounds=3, num_warmup=3, num_timed=6, peer_threads=_ONE),
    Plan(LONG, num_rounds=1, num_warmup=3, num_timed=6, peer_threads=_BOTH),
)


def bench_e2e(quick: bool, output: Path) -> BenchResult:
    """Measure the short workload (briefly where ``quick``) and, if not, the long-tailed one too.

    Raises:
        BenchError: TRL is not installed, or a run failed.
    """
    require_trl()
    load_before = os.getloadavg()[0]
    plans = QUICK if quick else FULL
    return report([(plan, measure(plan, output)) for plan in plans], load_before)


def measure(plan: Plan, output: Path) -> list[Round]:
    """Run every variant once a round, all from one initial model, which is kept in ``output``."""
    model = make_initial_model(plan.workload, output)
    overrides = {
        **plan.workload.training_overrides(plan.num_steps),
        "model.path": str(model),
        "model.architecture": "null",
    }
    num_problems = plan.num_steps * plan.workload.groups_per_step
    start = _Start(model, training_problems(resolve(overrides), num_problems), overrides)
    folders = [output / plan.workload.name / f"round-{i}" for i in range(plan.num_rounds)]
    return [_run_round(plan, start, folder) for folder in folders]


@dataclass(frozen=True)
class _Start:
    """What all runs of a workload begin with; ``overrides`` are Paceline's."""

    model: Path
    problems: Sequence[Problem]
    overrides: Mapping[str, str]


def _run_round(plan: Plan, start: _Start, folder: Path) -> Round:
    folder.mkdir(parents=True, exist_ok=True)
    windows = {}
    for name, num_threads in plan.peer_threads.items():
        steps = train_trl(
            f"trl-{num_threads}",
            folder,
            plan.workload,
            start.model,
            start.problems,
            plan.num_steps,
            num_threads,
        )
        windows[name] = peer_window(steps, plan.num_warmup)
    records = {}
    for name, changes in PACELINE_VARIANTS.items():
        records[name] = train(name, folder, {**start.overrides, **changes})
        windows[name] = paceline_window(
            records[name],
            plan.num_warmup,
            plan.workload.samples_per_group,
            overlapping=name != SYNCHRONOUS,
        )
    return Round(windows, controller_overhead(records[SYNCHRONOUS], plan.num_warmup))
