"""From the timed steps of a run to the figures that are compared: pure arithmetic.

Steps of a run are summed over its timed window (everything after the warm-up steps), so that
throughput is samples of the window over seconds of the window. Runs of several rounds are then
compared by medians.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from paceline.controller.bench.harness.result import BenchError
from paceline.controller.observe.files.records import StepRecord

T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """What one run did over its timed steps.

    Seconds are means a step: ``seconds`` wall time, the parts the time something was busy with it.
    ``other`` is what is left of the wall time, None where the parts run beside each other.
    ``padding_factor`` is tokens computed in training over real ones. Samples count completions;
    ``generated`` includes those of groups that were dropped, ``trained`` does not.
    """

    num_steps: int
    seconds: float
    generate: float
    train: float
    sync: float
    other: float | None
    padding_factor: float
    generated_per_second: float
    trained_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """The window as JSON."""
        return asdict(self)


def paceline_window(
    records: Sequence[StepRecord], num_warmup: int, samples_per_group: int, overlapping: bool
) -> Window:
    """The window of a run of Paceline, from the records of its training steps.

    ``train`` is the forward and backward passes and the optimiser step as the controller waits for
    them, ``sync`` publishing a version and bringing it to the engines, ``generate`` the seconds the
    engines were busy. With ``overlapping`` these run beside each other and ``other`` is None.

    Raises:
        BenchError: the run has no step after its warm-up.
    """
    timed = after_warmup(records, num_warmup)
    total = _total_times(timed)
    num_trained = sum(round((r.samples_per_second or 0.0) * _part(r, "step")) for r in timed)
    num_dropped = sum(sum(count or 0 for count in r.dropped.values()) for r in timed)
    num_generated = num_trained + num_dropped * samples_per_group
    padding = sum(r.metrics.get("padding_fraction") or 0.0 for r in timed) / len(timed)
    return _window(
        num_steps=len(timed),
        seconds=total["step"],
        parts={
            "generate": total["generate"],
            "train": total["train"] + total["optimizer"],
            "sync": total["publish"] + total["sync"],
        },
        overlapping=overlapping,
        padding_factor=1 / (1 - padding),
        num_generated=num_generated,
        num_trained=num_trained,
    )


def controller_overhead(records: Sequence[StepRecord], num_warmup: int) -> float:
    """Share of a synchronous step in which neither an engine nor the learner computes.

    ``1 - (generate + train + optimizer) / step`` over the timed steps: what controller, Ray,
    grading, weight updates and their hand-overs cost together.
    """
    total = _total_times(after_warmup(records, num_warmup))
    return 1 - (total["generate"] + total["train"] + total["optimizer"]) / total["step"]


def peer_window(steps: Sequence[Mapping[str, float]], num_warmup: int) -> Window:
    """The window of a run of the peer, from what ``trl_trainer`` wrote of each step.

    Raises:
        BenchError: the run has no step after its warm-up.
    """
    timed = after_warmup(steps, num_warmup)

    def total(name: str) -> float:
        return sum(step[name] for step in timed)

    return _window(
        num_steps=len(timed),
        seconds=total("seconds"),
        parts={
            "generate": total("generate"),
            "train": total("forward_backward") + total("optimizer"),
            "sync": 0.0,
        },
        overlapping=False,
        padding_factor=total("computed_tokens") / total("real_tokens"),
        num_generated=total("samples"),
        num_trained=total("samples"),
    )


def _window(
    *,
    num_steps: int,
    seconds: float,
    parts: Mapping[str, float],
    overlapping: bool,
    padding_factor: float,
    num_generated: float,
    num_trained: float,
) -> Window:
    means = {name: part / num_steps for name, part in parts.items()}
    mean_seconds = seconds / num_steps
    return Window(
        num_steps=num_steps,
        seconds=mean_seconds,
        other=None if overlapping else mean_seconds - sum(means.values()),
        padding_factor=padding_factor,
        generated_per_second=num_generated / seconds,
        trained_per_second=num_trained / seconds,
        **means,
    )


def after_warmup(steps: Sequence[T], num_warmup: int) -> Sequence[T]:
    """The timed steps of a run.

    Raises:
        BenchError: there are none.
    """
    if len(steps) <= num_warmup:
        raise BenchError(
            f"a run of the benchmark has {len(steps)} steps and {num_warmup} of them are warm-up: "
            "look into its log"
        )
    return steps[num_warmup:]


def _total_times(records: Sequence[StepRecord]) -> dict[str, float]:
    names = ("step", "generate", "train", "optimizer", "publish", "sync")
    return {name: sum(_part(record, name) for record in records) for name in names}


def _part(record: StepRecord, name: str) -> float:
    return record.time.get(name) or 0.0
