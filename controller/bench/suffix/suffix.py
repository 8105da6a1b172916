"""``paceline bench suffix``: the native drafter beside ``arctic-inference``, vLLM's ``suffix``.

Both learn the same rollouts of older weight versions, then draft for those of newer ones while they
come into being, siblings included, and at last drop the oldest version. Every figure is of a
process of its own, and rounds alternate between the two. Times are processor time of the calling
thread: both sides compute in it alone, and a busy machine shows less in them.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from paceline.controller.bench.harness.result import BenchResult, BenchTable, Spread, Target
from paceline.controller.bench.harness.subprocesses import in_own_process
from paceline.controller.bench.suffix.drafters import ArcticDrafter, Drafter, NativeDrafter
from paceline.controller.bench.suffix.replay import Replay, replay
from paceline.controller.bench.suffix.streams import Rollouts, recorded, synthetic
from paceline.controller.observe.files.versions import collect_versions

Side = Literal["paceline", "arctic"]
DRAFTERS: Mapping[Side, Callable[[], Drafter]] = {
    "paceline": NativeDrafter,
    "arctic": ArcticDrafter,
}
FEW_TOKENS = 100_000
PEER = "arctic-inference"
BATCH_SIZE = 64
SYNTHETIC, RECORDED = "synthetic", "recorded"
SEED = 0


@dataclass(frozen=True)
class Size:
    """Of the synthetic rollouts; the last generation is drafted for, the others are known."""

    num_problems: int
    num_generations: int
    num_samples: int
    length: int


FULL = Size(num_problems=128, num_generations=9, num_samples=8, length=512)
MANY_GENERATIONS = Size(num_problems=64, num_generations=17, num_samples=8, length=512)
QUICK = Size(num_problems=32, num_generations=5, num_samples=8, length=256)


@dataclass(frozen=True)
class Measured:
    """One drafter on one kind of rollouts. Times are microseconds, of drafting those of a request.

    Percentiles are over batches: of ``BATCH_SIZE`` requests, or (``alone``) of one. ``accepted``
    and ``drafted`` are tokens a round, over all. ``bytes_per_token`` is by how much resident memory
    grew, None where that is too little to tell.
    """

    num_tokens: int
    bytes_per_token: float | None
    insert: float
    propose_p50: float
    propose_p99: float
    alone_p50: float
    alone_p99: float
    evict: float
    accepted: float
    drafted: float


def bench_suffix(quick: bool, output: Path) -> BenchResult:
    """Measure both drafters on synthetic and on recorded rollouts.

    Raises:
        BenchError: ``arctic-inference`` is not installed.
    """
    ArcticDrafter()  # before anything is measured in vain
    sizes = {SYNTHETIC: QUICK, RECORDED: None}
    if not quick:
        sizes = {SYNTHETIC: FULL, "16 generations": MANY_GENERATIONS, RECORDED: None}
    found: dict[str, dict[Side, list[Measured]]] = {}
    for number, (kind, size) in itertools.product(range(1 if quick else 3), sizes.items()):
        sides = list(DRAFTERS)[:: 1 if number % 2 == 0 else -1]
        for side in sides:
            measured = in_own_process(measure, side, size)
            found.setdefault(kind, {}).setdefault(side, []).append(measured)
    versions = collect_versions(SEED)
    versions["packages"][PEER] = metadata.version(PEER)
    return _result(found, versions)


def measure(side: Side, size: Size | None) -> Measured:
    """One drafter on synthetic rollouts of some size, or on the recorded ones."""
    rollouts = recorded() if size is None else synthetic(**asdict(size), seed=SEED)
    drafter = DRAFTERS[side]()
    gc.collect()
    resident = _resident_bytes()
    num_tokens, insert_seconds = _learn(drafter, rollouts)
    grown = _resident_bytes() - resident
    few = max(1, rollouts.num_problems // 16)
    alone, together = Replay(), Replay()
    for generation in range(rollouts.num_known, rollouts.num_generations):
        replay(drafter, rollouts, generation, range(few), 1, alone)
        others = range(few, rollouts.num_problems)
        replay(drafter, rollouts, generation, others, BATCH_SIZE, together)
    oldest = sum(sample.size for group in rollouts.tokens[0] for sample in group)
    return Measured(
        num_tokens=num_tokens,
        bytes_per_token=None if num_tokens < FEW_TOKENS else grown / num_tokens,
        insert=1e6 * insert_seconds / num_tokens,
        **_percentiles("propose", together),
        **_percentiles("alone", alone),
        evict=1e6 * drafter.forget(0) / oldest,
        accepted=together.num_accepted / together.num_rounds,
        drafted=together.num_drafted / together.num_rounds,
    )


def _learn(drafter: Drafter, rollouts: Rollouts) -> tuple[int, float]:
    """Tokens of the generations that are known, and the seconds it took to learn them."""
    num_tokens, seconds = 0, 0.0
    for generation, problems in enumerate(rollouts.tokens[: rollouts.num_known]):
        for problem, (prompt, group) in enumerate(zip(rollouts.prompts, problems, strict=True)):
            for sample in group:
                seconds += drafter.learn(str(problem), generation, prompt, sample)
                num_tokens += sample.size
    return num_tokens, seconds


def _percentiles(name: str, found: Replay) -> dict[str, float]:
    p50, p99 = np.percentile(found.microseconds, [50, 99])
    return {f"{name}_p50": float(p50), f"{name}_p99": float(p99)}


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _result(
    found: Mapping[str, Mapping[Side, Sequence[Measured]]], versions: Mapping[str, Any]
) -> BenchResult:
    targets = {
        "bytes/token, synthetic": Target(
            Spread.of(_values(found[SYNTHETIC]["paceline"], "bytes_per_token")), "<=", 150
        ),
        "bytes/token over arctic's, synthetic": Target(
            Spread.of(_ratios(found[SYNTHETIC], "bytes_per_token")), "<=", 0.5
        ),
    }
    for kind, sides in found.items():
        faster = Spread.of(1 / ratio for ratio in _ratios(sides, "propose_p99"))
        targets[f"arctic's propose p99 over ours, {kind}"] = Target(faster, ">=", 5)
        accepted = Spread.of(_ratios(sides, "accepted"))
        targets[f"accepted a round over arctic's, {kind}"] = Target(accepted, ">=", 1)
    figures: dict[str, Any] = {
        kind: {side: [asdict(m) for m in each] for side, each in sides.items()}
        for kind, sides in found.items()
    }
    notes = (
        f"Propose: µs a request, of a batch of {BATCH_SIZE} (one native call here, arctic's is a "
        "Python call a request) and, alone, of a batch of one.",
    )
    tables = [_table(kind, sides) for kind, sides in found.items()]
    return BenchResult("suffix", targets, figures, {"streams": SEED}, versions, tables, notes)


def _ratios(sides: Mapping[Side, Sequence[Measured]], what: str) -> list[float]:
    """Ours over arctic's in each round."""
    pairs = zip(sides["paceline"], sides["arctic"], strict=True)
    return [getattr(ours, what) / getattr(theirs, what) for ours, theirs in pairs]


FIGURES = {
    "bytes_per_token": "bytes/token",
    "insert": "insert, µs/token",
    "propose_p50": "propose, p50",
    "propose_p99": "propose, p99",
    "alone_p50": "propose alone, p50",
    "alone_p99": "propose alone, p99",
    "evict": "evict, µs/token",
    "accepted": "accepted tokens a round",
    "drafted": "drafted tokens a round",
}


def _table(kind: str, sides: Mapping[Side, Sequence[Measured]]) -> BenchTable:
    num_tokens = sides["paceline"][0].num_tokens
    rows = [
        (what, *(_cell(_values(sides[side], name)) for side in DRAFTERS))
        for name, what in FIGURES.items()
    ]
    return BenchTable(f"{kind}: {num_tokens:,} tokens known", ("figure", *DRAFTERS), rows)


def _values(each: Sequence[Measured], what: str) -> list[float]:
    """The figure in each round that has it."""
    return [value for m in each if (value := getattr(m, what)) is not None]


def _cell(values: Sequence[float]) -> str:
    return str(Spread.of(values)) if values else "-"
