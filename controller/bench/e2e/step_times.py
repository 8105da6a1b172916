"""From the timed steps of a run to the figures that are compared: pure arithmetic.

Steps are summed over the timed window of a run, everything after its warm-up steps, so that
throughput is samples of the window over seconds of the window. Figures, by name:

- ``samples/s`` counts completions of dropped groups too, ``trained/s`` does not;
- ``s/step`` is wall time; ``generate``, ``train`` and ``sync`` are seconds a step in which
  something was busy with it; ``other`` is the rest of the step, None where the parts overlap;
- ``padding`` is tokens computed in training over real ones;
- ``overhead`` is the share of a synchronous step in which neither an engine nor the learner
  computes: what controller, Ray, grading, weight updates and their hand-overs cost together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from paceline.controller.bench.harness.result import BenchError, Figures
from paceline.controller.observe.files.records import StepRecord

T = TypeVar("T")


def paceline_figures(
    records: Sequence[StepRecord], num_warmup: int, samples_per_group: int, overlapping: bool
) -> Figures:
    """Return the figures of a run of Paceline, from the records of its training steps.

    ``train`` is the forward and backward passes and the optimiser step as the controller waits for
    them, ``sync`` publishing a version and bringing it to the engines.

    Raises:
        BenchError: the run has no step after its warm-up.
    """
    timed = after_warmup(records, num_warmup)
    step, generate = total(timed, "step"), total(timed, "generate")
    train = total(timed, "train", "optimizer")
    num_trained = sum(round((r.samples_per_second or 0.0) * total([r], "step")) for r in timed)
    num_dropped = sum(sum(count or 0 for count in r.dropped.values()) for r in timed)
    padding = sum(r.metrics.get("padding_fraction") or 0.0 for r in timed) / len(timed)
    figures = _figures(
        num_steps=len(timed),
        seconds=step,
        parts={"generate": generate, "train": train, "sync": total(timed, "publish", "sync")},
        padding=1 / (1 - padding),
        num_generated=num_trained + num_dropped * samples_per_group,
        num_trained=num_trained,
    )
    if overlapping:
        return {**figures, "other": None}
    return {**figures, "overhead": 1 - (generate + train) / step}


def peer_figures(steps: Sequence[Mapping[str, float]], num_warmup: int) -> Figures:
    """Return the figures of a run of the peer, from what ``trl_trainer`` wrote of each step.

    Raises:
        BenchError: the run has no step after its warm-up.
    """
    timed = after_warmup(steps, num_warmup)
    sums = {name: sum(step[name] for step in timed) for name in timed[0]}
    return _figures(
        num_steps=len(timed),
        seconds=sums["seconds"],
        parts={
            "generate": sums["generate"],
            "train": sums["forward_backward"] + sums["optimizer"],
            "sync": 0.0,
        },
        padding=sums["computed_tokens"] / sums["real_tokens"],
        num_generated=sums["samples"],
        num_trained=sums["samples"],
    )


def after_warmup(steps: Sequence[T], num_warmup: int) -> Sequence[T]:
    """Return the timed steps of a run.

    Raises:
        BenchError: there are none.
    """
    if len(steps) <= num_warmup:
        raise BenchError(
            f"a run of the benchmark has {len(steps)} steps and {num_warmup} of them are warm-up: "
            "look into its log"
        )
    return steps[num_warmup:]


def total(records: Sequence[StepRecord], *parts: str) -> float:
    """Return the seconds of some parts of all steps together."""
    return sum(record.time.get(part) or 0.0 for record in records for part in parts)


def _figures(
    *,
    num_steps: int,
    seconds: float,
    parts: Mapping[str, float],
    padding: float,
    num_generated: float,
    num_trained: float,
) -> Figures:
    means = {name: part / num_steps for name, part in parts.items()}
    return {
        "samples/s": num_generated / seconds,
        "trained/s": num_trained / seconds,
        "s/step": seconds / num_steps,
        **means,
        "other": seconds / num_steps - sum(means.values()),
        "padding": padding,
    }
