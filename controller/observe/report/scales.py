"""Where a number lies on a chart: linear scales with round ticks, and the axis of a run's steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from paceline.controller.observe.files.records import Phase

WARM_START_WIDTH = 0.2
"""Share of the step axis that the warm start takes where a chart shows both phases."""

STEP_SIZES = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Scale:
    """Maps ``[low, high]`` linearly to ``[start, end]`` (which may run backwards)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The position of a value."""
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)

    def ticks(self, num_ticks: int) -> list[float]:
        """At most ``num_ticks`` and a few round values inside the scale."""
        step = _round_step((self.high - self.low) / max(1, num_ticks))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True)
class StepAxis:
    """The horizontal axis: the warm start's steps in a segment of their own, then training's.

    Either may be 0 steps; then the other has the whole axis.
    """

    num_warm: int
    num_train: int
    start: float
    end: float

    @property
    def border(self) -> float:
        """Where the warm start ends and training begins."""
        if not self.num_warm:
            return self.start
        share = WARM_START_WIDTH if self.num_train else 1.0
        return self.start + share * (self.end - self.start)

    def scale(self, phase: Phase) -> Scale:
        """The scale of one phase's steps."""
        if phase == "warm_start":
            return Scale(0, max(1, self.num_warm), self.start, self.border)
        return Scale(0, max(1, self.num_train), self.border, self.end)

    def ticks(self) -> list[tuple[float, int]]:
        """Position and step of every tick; whole steps only."""
        ticks = []
        for phase, num_steps in (("warm_start", self.num_warm), ("train", self.num_train)):
            scale = self.scale(phase)  # type: ignore[arg-type]
            if not num_steps:
                continue
            room = max(1, round(abs(scale.end - scale.start) / 75))
            ticks += [(scale(tick), round(tick)) for tick in scale.ticks(room) if tick % 1 == 0]
            if phase == "warm_start" and self.num_train:
                ticks = [(at, step) for at, step in ticks if self.border - at > 18]
        return ticks


NOTHING = 1e-300
"""A range so narrow cannot be divided into steps that floats tell apart."""


def value_range(values: Iterable[float], num_ticks: int) -> tuple[float, float]:
    """A range that holds 0 and the values and begins and ends on a tick; never of zero width."""
    low, high = 0.0, 0.0
    for value in values:
        low, high = min(low, value), max(high, value)
    if high - low < NOTHING:
        return 0.0, 1.0
    step = 0.0
    while (wider := _round_step((high - low) / num_ticks)) > step:
        step = wider
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return low, high


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not smaller than ``step``."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(size * power for size in STEP_SIZES if size * power >= step * (1 - 1e-9))
