"""``paceline bench suffix``: the native drafter beside ``arctic-inference``, vLLM's ``suffix``.

Both learn the same rollouts of older weight versions, then draft for those of newer ones while they
come into being, siblings included, and at last drop the oldest version. Every figure is of a
process of its own, and rounds alternate between the two. Times are processor time of the calling
thread: both sides compute in it alone, and a busy machine shows less in them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from paceline.controller.bench.harness.compare import Case, compare
from paceline.controller.bench.harness.resident_memory import resident_bytes
from paceline.controller.bench.harness.result import BenchResult, Figures, Measured, Target
from paceline.controller.bench.harness.subprocesses import in_own_process
from paceline.controller.bench.suffix.drafters import ArcticDrafter, Drafter, NativeDrafter
from paceline.controller.bench.suffix.replay import Replay, replay
from paceline.controller.bench.suffix.streams import Rollouts, recorded, synthetic

OURS, ARCTIC = "paceline", "arctic"
DRAFTERS: Mapping[str, Callable[[], Drafter]] = {OURS: NativeDrafter, ARCTIC: ArcticDrafter}
FEW_TOKENS = 100_000
PEER = "arctic-inference"
BATCH_SIZE = 64
SYNTHETIC, RECORDED = "synthetic", "recorded"
MEMORY, SLOWEST, ACCEPTED = "bytes/token", "propose, p99", "accepted a round"
SEED = 0


@dataclass(frozen=True)
class Size:
    """Size of synthetic rollouts; the last generation is drafted for, the others are known."""

    num_problems: int
    num_generations: int
    num_samples: int
    length: int


FULL = Size(num_problems=128, num_generations=9, num_samples=8, length=512)
MANY_GENERATIONS = Size(num_problems=64, num_generations=17, num_samples=8, length=512)
QUICK = Size(num_problems=32, num_generations=5, num_samples=8, length=256)


def bench_suffix(quick: bool, output: Path) -> BenchResult:
    """Measure both drafters on synthetic and on recorded rollouts.

    Raises:
        BenchError: ``arctic-inference`` is not installed.
    """
    ArcticDrafter()  # before anything is measured in vain
    sizes = {SYNTHETIC: QUICK, RECORDED: None}
    if not quick:
        sizes = {SYNTHETIC: FULL, "16 generations": MANY_GENERATIONS, RECORDED: None}
    return compare(
        "suffix",
        {kind: Case(list(DRAFTERS), 1 if quick else 3) for kind in sizes},
        lambda kind, side, _: in_own_process(measure, side, sizes[kind]),
        targets_of(list(sizes)),
        ratios=[(figure, ARCTIC) for figure in (MEMORY, SLOWEST, ACCEPTED)],
        seed=SEED,
        packages=[PEER],
        notes=lambda measured: [
            f"Propose: µs a request, of a batch of {BATCH_SIZE} (one native call here, arctic's is "
            "a Python call a request) and, alone, of a batch of one; insert, evict: µs a token."
        ],
    )


def targets_of(kinds: Sequence[str]) -> list[Target]:
    """Return what is asked of memory on the synthetic rollouts, and of drafts on each kind."""

    def over_arctic(figure: str, kind: str, measured: Measured) -> list[float]:
        return measured.ratios(kind, OURS, ARCTIC, figure)

    def memory(measured: Measured) -> list[float]:
        return measured.values(SYNTHETIC, OURS, MEMORY)

    def faster(kind: str, measured: Measured) -> list[float]:
        return measured.ratios(kind, ARCTIC, OURS, SLOWEST)

    less, accepted = partial(over_arctic, MEMORY, SYNTHETIC), partial(over_arctic, ACCEPTED)
    targets = [
        Target("bytes/token, synthetic", "<=", 150, memory),
        Target("bytes/token over arctic's, synthetic", "<=", 0.5, less),
    ]
    for kind in kinds:
        times, equal = partial(faster, kind), partial(accepted, kind)
        targets.append(Target(f"arctic's propose p99 over ours, {kind}", ">=", 5, times))
        targets.append(Target(f"accepted a round over arctic's, {kind}", ">=", 1, equal))
    return targets


def measure(side: str, size: Size | None) -> Figures:
    """Measure one drafter on synthetic rollouts of some size, or on the recorded ones.

    Times are microseconds. Percentiles are over batches: of ``BATCH_SIZE`` requests, or (``alone``)
    of one. ``accepted`` and ``drafted`` are tokens a round. Bytes are by how much resident memory
    grew, None where that is too little to tell.
    """
    rollouts = recorded() if size is None else synthetic(**asdict(size), seed=SEED)
    drafter = DRAFTERS[side]()
    gc.collect()
    resident = resident_bytes()
    num_tokens, insert_seconds = _learn(drafter, rollouts)
    grown = resident_bytes() - resident
    few = max(1, rollouts.num_problems // 16)
    alone, together = Replay(), Replay()
    for generation in range(rollouts.num_known, rollouts.num_generations):
        replay(drafter, rollouts, generation, range(few), 1, alone)
        others = range(few, rollouts.num_problems)
        replay(drafter, rollouts, generation, others, BATCH_SIZE, together)
    oldest = sum(sample.size for group in rollouts.tokens[0] for sample in group)
    return {
        "tokens known": num_tokens,
        MEMORY: None if num_tokens < FEW_TOKENS else grown / num_tokens,
        "insert": 1e6 * insert_seconds / num_tokens,
        **_percentiles("propose", together),
        **_percentiles("propose alone", alone),
        "evict": 1e6 * drafter.forget(0) / oldest,
        ACCEPTED: together.num_accepted / together.num_rounds,
        "drafted a round": together.num_drafted / together.num_rounds,
    }


def _learn(drafter: Drafter, rollouts: Rollouts) -> tuple[int, float]:
    """Learn the generations that are known; return their tokens and the seconds it took."""
    num_tokens, seconds = 0, 0.0
    for generation, problems in enumerate(rollouts.tokens[: rollouts.num_known]):
        for problem, (prompt, group) in enumerate(zip(rollouts.prompts, problems, strict=True)):
            for sample in group:
                seconds += drafter.learn(str(problem), generation, prompt, sample)
                num_tokens += sample.size
    return num_tokens, seconds


def _percentiles(name: str, found: Replay) -> dict[str, float]:
    p50, p99 = np.percentile(found.microseconds, [50, 99])
    return {f"{name}, p50": float(p50), f"{name}, p99": float(p99)}
