"""``paceline bench e2e``: whole training steps of Paceline beside TRL's GRPOTrainer.

Both sides start from the same model and train on the same problems in the same order, with the same
reward, batch, precision, optimiser and loss, one torch thread a process. Targets are against the
peer with a thread a process too; its variant on two threads shows what it makes of a second core,
which asynchronous Paceline uses as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from paceline.controller.bench.e2e.paceline_runs import initial_model, resolve, train
from paceline.controller.bench.e2e.step_times import paceline_figures, peer_figures
from paceline.controller.bench.e2e.trl_runs import require_trl, train_trl, training_problems
from paceline.controller.bench.e2e.workload import LONG, SHORT, Workload
from paceline.controller.bench.harness.compare import Case, compare
from paceline.controller.bench.harness.result import BenchResult, Figures, Measured, Target

PEER, PEER_ON_ALL_CORES = "TRL", "TRL, 2 threads"
SYNCHRONOUS, ASYNCHRONOUS, DEFAULTS = "synchronous", "asynchronous", "defaults"

PEER_THREADS: Mapping[str, int] = {PEER: 1, PEER_ON_ALL_CORES: 2}
PACELINE_VARIANTS: Mapping[str, Mapping[str, str]] = {
    SYNCHRONOUS: {"loop.max_lag": "0", "algorithm.zero_signal": "keep"},
    ASYNCHRONOUS: {"algorithm.zero_signal": "keep"},
    DEFAULTS: {},
}


@dataclass(frozen=True)
class Plan:
    """Measurement of a workload: every variant once a round, untimed steps first."""

    workload: Workload
    num_rounds: int
    num_timed: int
    variants: Sequence[str] = (PEER, *PACELINE_VARIANTS)
    num_warmup: int = 3

    @property
    def num_steps(self) -> int:
        """Optimiser steps of one run."""
        return self.num_warmup + self.num_timed


# Each variant starts for half a minute. What overlapping wins, `bench async --quick` measures too.
QUICK = (Plan(SHORT, num_rounds=1, num_timed=3, variants=(PEER, SYNCHRONOUS)),)
FULL = (
    Plan(SHORT, num_rounds=3, num_timed=6),
    Plan(LONG, num_rounds=1, num_timed=6, variants=(*PEER_THREADS, *PACELINE_VARIANTS)),
)


def bench_e2e(quick: bool, output: Path) -> BenchResult:
    """Measure the short workload (briefly where ``quick``) and, if not, the long-tailed one too.

    Raises:
        BenchError: TRL is not installed, or a run failed.
    """
    require_trl()
    plans = {plan.workload.name: plan for plan in (QUICK if quick else FULL)}
    starts = {name: start_of(plan, output) for name, plan in plans.items()}
    return compare(
        "e2e",
        {name: Case(plan.variants, plan.num_rounds) for name, plan in plans.items()},
        lambda case, variant, number: measure(
            plans[case], starts[case], variant, output / case / f"round-{number}"
        ),
        [target for name, plan in plans.items() for target in targets_of(name, plan.variants)],
        ratios=[("samples/s", PEER)],
        packages=["trl"],
        notes=lambda measured: [note for plan in plans.values() for note in notes_of(plan)],
    )


def start_of(plan: Plan, output: Path) -> Mapping[str, str]:
    """Return the overrides of all runs, which start from one model that is kept in ``output``."""
    settings = plan.workload.training_overrides(plan.num_steps)
    return {**settings, **initial_model(plan.workload, output)}


def measure(plan: Plan, start: Mapping[str, str], variant: str, folder: Path) -> Figures:
    """Run one variant in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if variant in PEER_THREADS:
        threads = PEER_THREADS[variant]
        problems = training_problems(resolve(start), plan.num_steps * plan.workload.groups_per_step)
        model = Path(start["model.path"])
        steps = train_trl(
            f"trl-{threads}", folder, plan.workload, model, problems, plan.num_steps, threads
        )
        return peer_figures(steps, plan.num_warmup)
    records = train(variant, folder, {**start, **PACELINE_VARIANTS[variant]})
    samples_per_group = plan.workload.samples_per_group
    return paceline_figures(
        records, plan.num_warmup, samples_per_group, overlapping=variant != SYNCHRONOUS
    )


def notes_of(plan: Plan) -> list[str]:
    """Say what the workload is and which of Paceline's variants were left out."""
    name, left_out = plan.workload.name, [v for v in PACELINE_VARIANTS if v not in plan.variants]
    said = f"{name}: not measured, with their targets: {', '.join(left_out)}"
    return [f"{name}: {plan.workload.description}", *([said] if left_out else [])]


def targets_of(case: str, variants: Sequence[str]) -> list[Target]:
    """Return what is asked of these variants, each the median of the rounds' own ratios."""

    def faster(variant: str, other: str, measured: Measured) -> list[float]:
        return measured.ratios(case, variant, other, "samples/s")

    def overhead(measured: Measured) -> list[float]:
        return measured.values(case, SYNCHRONOUS, "overhead")

    equal, defaults = partial(faster, SYNCHRONOUS, PEER), partial(faster, DEFAULTS, PEER)
    overlapped = partial(faster, ASYNCHRONOUS, SYNCHRONOUS)
    same_settings = f"{case}: synchronous over TRL, samples/s, equal settings"
    asked = {
        SYNCHRONOUS: [
            Target(same_settings, ">=", 3.0, equal),
            Target(f"{case}: overhead of a synchronous step", "<=", 0.15, overhead),
        ],
        DEFAULTS: [Target(f"{case}: defaults over TRL, generated samples/s", ">=", 5.0, defaults)],
        ASYNCHRONOUS: [
            Target(f"{case}: asynchronous over synchronous, samples/s", ">", 1.0, overlapped)
        ],
    }
    return [target for variant in variants for target in asked.get(variant, ())]
