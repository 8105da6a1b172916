"""``paceline bench learner``: the learner's step beside TRL's and a plain one, on the same batch.

Each side trains the same model on the same long-tailed groups with the same loss, precision and
optimiser, one torch thread, in a process of its own; rounds of all sides are interleaved. The peers
get the micro-batch size that is fastest for them. What a step is useful for is counted the same for
all: trained tokens, and the floating-point operations that they need at least. Ours is measured
also divided over two ranks, in every way there is. How long a sequence fits a fixed memory is
measured by ``memory.py``.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from paceline.configs.schema.learner import LearnerConfig
from paceline.controller.bench.e2e.trl_runs import require_trl
from paceline.controller.bench.harness.compare import Case, compare
from paceline.controller.bench.harness.result import BenchResult, Figures, Measured, Target
from paceline.controller.bench.harness.subprocesses import in_own_process
from paceline.controller.bench.learner import memory
from paceline.controller.bench.learner.batch import BRIEF, LONG_TAILED, LearnerWorkload
from paceline.controller.bench.learner.memory import (
    CHUNKS,
    MemoryPlan,
    measure_memory,
    memory_figures,
)
from paceline.controller.bench.learner.steps import (
    ALONE,
    divided_steps,
    matmul_flops,
    paceline_steps,
    plain_steps,
)

OURS, PLAIN, PEER = "paceline", "plain HF step", "TRL's step"
STEP, LENGTH = "one step", "longest sequence in 256 MiB, weights and optimiser included"


def _two_ranks(**settings: Any) -> LearnerConfig:
    return LearnerConfig.model_validate({**ALONE.model_dump(), "num_ranks": 2, **settings})


ON_TWO_RANKS: Mapping[str, LearnerConfig] = {
    "samples and weights (FSDP2)": _two_ranks(),
    "samples and optimiser (ZeRO-2)": _two_ranks(engine="deepspeed"),
    "tensor": _two_ranks(parallel={"tensor": 2}),
    "sequence": _two_ranks(parallel={"sequence": 2}),
    # all stages are busy only where there are several microbatches
    "pipeline": _two_ranks(parallel={"pipeline": 2}, tokens_per_microbatch=512),
}
"""What the ranks divide."""

Side = Callable[[LearnerWorkload, Path, int], list[float]]


@dataclass(frozen=True)
class Plan:
    """Extent of a measurement; micro-batch sizes are the fastest of 8, 16 and 32 samples."""

    workload: LearnerWorkload
    memory: MemoryPlan
    num_rounds: int
    num_steps: int
    meshes: Sequence[str] = tuple(ON_TWO_RANKS)
    plain_microbatch: int = 8
    peer_microbatch: int = 32

    @property
    def cases(self) -> dict[str, Case]:
        """Cases with the sides that each is measured on."""
        return {
            STEP: Case([OURS, PLAIN, PEER, *self.meshes], self.num_rounds),
            LENGTH: Case(list(self.memory.lengths), 1),
        }


QUICK = Plan(BRIEF, memory.QUICK, num_rounds=1, num_steps=1, meshes=[])
FULL = Plan(LONG_TAILED, memory.FULL, num_rounds=3, num_steps=2)


def bench_learner(quick: bool, output: Path) -> BenchResult:
    """Measure throughput and memory, briefly where ``quick``.

    Raises:
        BenchError: TRL is not installed.
    """
    require_trl()
    os.environ["OMP_NUM_THREADS"] = "1"
    plan = QUICK if quick else FULL
    workload = plan.workload
    model = workload.write_model(output / ("learner-quick" if quick else "learner") / "model")
    sides = sides_of(plan)
    peaks = cache(partial(measure_memory, plan.memory, output))

    def measure(case: str, side: str, _: int) -> Figures:
        if case == LENGTH:  # all sides at once: what one holds is not changed by another
            return memory_figures(peaks()[side], plan.memory.memory)
        return step_figures(
            plan, side, in_own_process(sides[side], workload, model, plan.num_steps)
        )

    return compare(
        "learner",
        plan.cases,
        measure,
        TARGETS,
        ratios=[("trained tokens/s", PEER), ("trained tokens/s", OURS), ("longest", memory.PLAIN)],
        seed=workload.seed,
        packages=["trl"],
        notes=lambda measured: [describe(workload)],
    )


def sides_of(plan: Plan) -> Mapping[str, Side]:
    """Return the sides by name, each a function that times its steps."""
    from paceline.controller.bench.learner.peer import trl_steps

    return {
        OURS: paceline_steps,
        PLAIN: partial(plain_steps, microbatch_size=plan.plain_microbatch),
        PEER: partial(trl_steps, microbatch_size=plan.peer_microbatch),
        **{name: partial(divided_steps, config=ON_TWO_RANKS[name]) for name in plan.meshes},
    }


def step_figures(plan: Plan, side: str, seconds: Sequence[float]) -> Figures:
    """Return the speed of a side whose steps took ``seconds``, and how much of this machine's rate
    it makes use of, measured now on one thread."""
    step = statistics.median(seconds)
    used = plan.workload.required_flops() / step / matmul_flops()
    return {
        "s/step": step,
        "trained tokens/s": plan.workload.batch().num_trained_tokens / step,
        "use of the matmul rate": None if side in ON_TWO_RANKS else used,
    }


def describe(workload: LearnerWorkload) -> str:
    """Say what a step is, and what it is useful for."""
    num_trained, flops = workload.batch().num_trained_tokens, workload.required_flops()
    return (
        f"A step is on {workload.num_samples} completions of {num_trained:,} tokens; useful are "
        f"{flops:.3g} operations: every prompt once, every completion once, the vocabulary for "
        "trained tokens only. The matmul rate is that of a float32 product of one thread."
    )


def _faster(measured: Measured) -> list[float]:
    return measured.ratios(STEP, OURS, PEER, "trained tokens/s")


def _longer(measured: Measured) -> list[float]:
    return measured.ratios(LENGTH, CHUNKS, memory.PLAIN, "longest")


TARGETS = [
    Target("trained tokens/s over TRL, long-tailed", ">=", 2.5, _faster),
    Target("longest sequence over plain checkpointing", ">=", 2.5, _longer),
]
