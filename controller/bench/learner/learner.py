"""``paceline bench learner``: the learner's step beside TRL's and a plain one, on the same batch.

Each side trains the same model on the same long-tailed groups with the same loss, precision and
optimiser, one torch thread, in a process of its own; rounds of all sides are interleaved. The peers
get the micro-batch size that is fastest for them. What a step is useful for is counted the same for
all: trained tokens, and the floating-point operations that they need at least. Ours is measured
also divided over two ranks, in every way there is. How long a sequence fits a fixed memory is
measured by ``learner_memory.py``.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from paceline.configs.schema.learner import LearnerConfig
from paceline.controller.bench.e2e.trl_runs import require_trl
from paceline.controller.bench.harness.result import BenchResult, BenchTable, Spread, Target
from paceline.controller.bench.harness.subprocesses import in_own_process
from paceline.controller.bench.learner.batch import BRIEF, LONG_TAILED, LearnerWorkload
from paceline.controller.bench.learner.memory import CHUNKS, SequenceMemory, measure_memory
from paceline.controller.bench.learner.steps import (
    ALONE,
    divided_steps,
    matmul_flops,
    paceline_steps,
    plain_steps,
)
from paceline.controller.observe.files.versions import collect_versions

OURS, PLAIN, PEER = "paceline", "plain HF step", "TRL's step"
SPEEDUP_TARGET, LENGTH_TARGET = 2.5, 2.5


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
    """How much is measured; micro-batch sizes are the fastest of 8, 16 and 32 samples."""

    workload: LearnerWorkload
    num_rounds: int
    num_steps: int
    meshes: Sequence[str] = tuple(ON_TWO_RANKS)
    plain_microbatch: int = 8
    peer_microbatch: int = 32


QUICK = Plan(BRIEF, num_rounds=1, num_steps=1, meshes=[])
FULL = Plan(LONG_TAILED, num_rounds=3, num_steps=2)


def bench_learner(quick: bool, output: Path) -> BenchResult:
    """Measure throughput and memory, briefly where ``quick``.

    Raises:
        BenchError: TRL is not installed.
    """
    require_trl()
    os.environ["OMP_NUM_THREADS"] = "1"
    plan = QUICK if quick else FULL
    model = plan.workload.write_model(output / ("learner-quick" if quick else "learner") / "model")
    sides = sides_of(plan)
    rounds = [one_round(plan, model, sides) for _ in range(plan.num_rounds)]
    return report(plan, rounds, measure_memory(quick, output))


def sides_of(plan: Plan) -> Mapping[str, Side]:
    """Who takes the step."""
    from paceline.controller.bench.learner.peer import trl_steps

    return {
        OURS: paceline_steps,
        PLAIN: partial(plain_steps, microbatch_size=plan.plain_microbatch),
        PEER: partial(trl_steps, microbatch_size=plan.peer_microbatch),
        **{name: partial(divided_steps, config=ON_TWO_RANKS[name]) for name in plan.meshes},
    }


@dataclass(frozen=True)
class Round:
    """Seconds of a step by side, medians; ``matmul`` in floating-point operations a second."""

    seconds: Mapping[str, float]
    matmul: float


def one_round(plan: Plan, model: Path, sides: Mapping[str, Side]) -> Round:
    """Every side once."""
    seconds = {
        name: statistics.median(in_own_process(side, plan.workload, model, plan.num_steps))
        for name, side in sides.items()
    }
    return Round(seconds, matmul_flops())


def report(plan: Plan, rounds: Sequence[Round], memory: SequenceMemory) -> BenchResult:
    """Tables and targets."""
    workload = plan.workload
    return BenchResult(
        bench="learner",
        targets={
            "trained tokens/s over TRL, long-tailed": Target(
                times_faster(rounds, OURS, PEER), ">=", SPEEDUP_TARGET
            ),
            "longest sequence over plain checkpointing": Target(
                Spread.of([memory.times_plain(CHUNKS)]), ">=", LENGTH_TARGET
            ),
        },
        figures={
            "workload": asdict(workload),
            "seconds": [dict(r.seconds) for r in rounds],
            "matmul_flops": [r.matmul for r in rounds],
            "required_flops": workload.required_flops(),
            "memory": asdict(memory),
        },
        seeds={"workload": workload.seed},
        versions={**collect_versions(workload.seed), "trl": metadata.version("trl")},
        tables=[
            sides_table(workload, rounds),
            *([meshes_table(plan.meshes, rounds)] if plan.meshes else []),
            memory.table(),
        ],
        notes=[
            "What a step is useful for: every prompt once, every completion once, the vocabulary "
            "for trained tokens only; the ceiling is a float32 product of one thread, measured in "
            "each round."
        ],
    )


def times_faster(rounds: Sequence[Round], side: str, other: str) -> Spread:
    """How many times as fast a side is as another, a ratio a round."""
    return Spread.of(r.seconds[other] / r.seconds[side] for r in rounds)


def sides_table(workload: LearnerWorkload, rounds: Sequence[Round]) -> BenchTable:
    """One process a side."""
    num_trained, flops = workload.batch().num_trained_tokens, workload.required_flops()
    rows = []
    for side in (OURS, PLAIN, PEER):
        speed = Spread.of(num_trained / r.seconds[side] for r in rounds)
        used = Spread.of(flops / r.seconds[side] / r.matmul for r in rounds)
        over_peer = times_faster(rounds, side, PEER)
        rows.append((side, str(speed), str(over_peer), f"{used.median:.0%}"))
    return BenchTable(
        f"one step on {workload.num_samples} completions of {num_trained:,} tokens",
        ("side", "trained tokens/s", "times TRL", "use of the matmul rate"),
        rows,
    )


def meshes_table(meshes: Sequence[str], rounds: Sequence[Round]) -> BenchTable:
    """Two processes, by what they divide."""
    return BenchTable(
        "the same step on two ranks of this machine (gloo)",
        ("what they divide", "times one rank"),
        [(mesh, str(times_faster(rounds, mesh, OURS))) for mesh in meshes],
    )
