"""How far a run has come: what the views show, kept up to date by its records."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paceline.configs.schema import RunConfig
from paceline.controller.observe.files.records import (
    OVERLAPPING_PARTS,
    WHOLE_STEP,
    EvaluationRecord,
    Phase,
    SampleRecord,
    StepRecord,
)

NUM_RECENT_STEPS = 20
NUM_RECENT_SAMPLES = 4


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run. ``warm_start_steps`` is an upper bound, 0 without a warm start."""

    name: str
    num_steps: int
    warm_start_steps: int
    max_lag: int

    @classmethod
    def from_config(cls, config: RunConfig) -> RunPlan:
        """Return the plan that a configuration describes."""
        return cls(
            name=config.name,
            num_steps=config.loop.num_steps,
            warm_start_steps=config.warm_start.max_steps if config.warm_start else 0,
            max_lag=config.loop.max_lag,
        )

    def total(self, phase: Phase) -> int:
        """Return the planned steps of a phase."""
        return self.num_steps if phase == "train" else self.warm_start_steps


@dataclass
class ViewState:
    """The run as its records tell it; only ``plan`` is given, the rest accumulates."""

    plan: RunPlan
    last: StepRecord | None = None
    recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=NUM_RECENT_STEPS))
    rewards: list[float | None] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    samples: deque[SampleRecord] = field(default_factory=lambda: deque(maxlen=NUM_RECENT_SAMPLES))
    dropped: Counter[str] = field(default_factory=Counter)
    workers: dict[str, str] = field(default_factory=dict)
    message: str = ""

    def step(self, record: StepRecord) -> None:
        """Add a finished step. The first of a phase starts that phase's curves afresh."""
        if self.last is None or self.last.phase != record.phase:
            self.recent.clear()
            self.rewards.clear()
            self.losses.clear()
        self.last = record
        self.recent.append(record)
        self.rewards.append(record.reward)
        self.losses.append(record.loss)
        self.dropped.update({reason: int(n) for reason, n in record.dropped.items() if n})

    def evaluation(self, record: EvaluationRecord) -> None:
        """Add a finished evaluation."""
        self.evaluations.append(record)

    def add_samples(self, records: Sequence[SampleRecord]) -> None:
        """Add rollouts that are worth showing."""
        self.samples.extend(records)

    @property
    def total(self) -> int:
        """Planned steps of the phase at work."""
        return self.plan.total(self.last.phase) if self.last else self.plan.num_steps

    @property
    def seconds_per_step(self) -> float | None:
        """Wall time of a recent step, evaluations in between included."""
        if len(self.recent) < 2:
            return None
        first, last = self.recent[0], self.recent[-1]
        return (last.seconds - first.seconds) / max(1, last.step - first.step)

    @property
    def seconds_left(self) -> float | None:
        """Estimated wall time to the end of the phase at work."""
        pace = self.seconds_per_step
        if pace is None or self.last is None:
            return None
        return pace * max(0, self.total - self.last.step)

    def time_shares(self) -> dict[str, float]:
        """Return the shares of recent steps' wall time by part, in order; they sum to 1."""
        return shares(sequential_time(self.recent))


def sequential_time(steps: Sequence[StepRecord] | deque[StepRecord]) -> dict[str, float]:
    """Return seconds by part over the given steps, without the parts that run beside the others."""
    seconds: dict[str, float] = {}
    for record in steps:
        for part, value in time_parts(record).items():
            seconds[part] = seconds.get(part, 0.0) + value
    return seconds


def time_parts(record: StepRecord) -> dict[str, float]:
    """Return the parts of a step's wall time that follow one another; ``other`` is the rest.

    The rest is known only where the record has the whole step's time.
    """
    beside = (*OVERLAPPING_PARTS, WHOLE_STEP)
    parts = {name: value for name, value in record.time.items() if value and name not in beside}
    rest = (record.time.get(WHOLE_STEP) or 0.0) - sum(parts.values())
    return {**parts, "other": rest} if rest > 0 else parts


def shares(parts: Mapping[str, float]) -> dict[str, float]:
    """Return the parts as fractions of their sum; nothing where the sum is nothing."""
    total = sum(parts.values())
    return {name: value / total for name, value in parts.items()} if total > 0 else {}
