"""What a chart shows: curves over a run's steps, and the axis that the steps lie on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from statistics import fmean
from typing import Any, Literal, NamedTuple

from paceline.controller.observe.files.records import Phase
from paceline.controller.observe.view.text import count, fit_line, number

MAX_POINTS = 400
"""Longer curves are drawn as means of neighbouring steps."""
MAX_AREA_POINTS = 80
"""The same for areas, whose edges would be a thicket."""
WARM_START_WIDTH = 0.2
"""Share of the step axis that the warm start takes where a chart shows both phases."""
NUM_COLORS = 7

Style = Literal["smooth", "dots", "steps", "area"]
Size = Literal["wide", "half", "third", "file"]
Unit = Literal["number", "count", "percent"]

FORMATS: dict[Unit, Callable[[float], str]] = {
    "number": number,
    "count": count,
    "percent": lambda value: f"{100 * value:.3g}%",
}


def color_of(index: int) -> str:
    """Return the colour of a chart's series, a variable of ``theme.css``."""
    return f"var(--c{index % NUM_COLORS + 1})"


class Point(NamedTuple):
    """A value of a phase's step; ``error`` is the half-length of its whisker."""

    phase: Phase
    step: float
    value: float
    error: float = 0.0


@dataclass(frozen=True)
class Series:
    """One curve.

    ``smooth`` draws the points faintly under their moving mean. ``dots`` marks and joins them.
    ``steps`` holds each value to the next. ``area`` is piled upon the areas before it.
    """

    name: str
    points: Sequence[Point]
    style: Style = "smooth"

    @property
    def label(self) -> str:
        """The name on a line, as a legend has room for."""
        return fit_line(self.name, 80)

    def thinned(self) -> Series:
        """Return the series with fewer points, each the mean of its neighbours; dots stay."""
        most = MAX_AREA_POINTS if self.style == "area" else MAX_POINTS
        size = math.ceil(len(self.points) / most)
        if size <= 1 or self.style == "dots":
            return self
        phases = [list(points) for _, points in groupby(self.points, key=itemgetter(0))]
        parts = [own[at : at + size] for own in phases for at in range(0, len(own), size)]
        means = [part[-1]._replace(value=fmean(point.value for point in part)) for part in parts]
        return replace(self, points=means)


@dataclass(frozen=True)
class StepAxis:
    """The horizontal axis, from 0 to 1: the warm start's steps in a segment of their own.

    Either phase may have 0 steps. Then the other one has the whole axis.
    """

    num_warm: int
    num_train: int

    @property
    def border(self) -> float:
        """The place where the warm start ends and training begins."""
        if not self.num_warm:
            return 0.0
        return WARM_START_WIDTH if self.num_train else 1.0

    def place(self, phase: Phase, step: float) -> float:
        """Return where a step of a phase lies."""
        if phase == "warm_start":
            return self.border * step / max(1, self.num_warm)
        return self.border + (1 - self.border) * step / max(1, self.num_train)

    def ticks(self, num_ticks: int) -> dict[float, str]:
        """Return place and label of about ``num_ticks`` round steps."""
        warm = _round_steps(self.num_warm, num_ticks * self.border)
        ticks = {self.place("warm_start", step): str(step) for step in warm if self.num_warm}
        if self.num_train:
            train = _round_steps(self.num_train, num_ticks * (1 - self.border))
            ticks = {at: step for at, step in ticks.items() if at < 0.85 * self.border}
            ticks |= {self.place("train", step): str(step) for step in train}
        return ticks


@dataclass(frozen=True)
class Chart:
    """Curves over a run's steps. ``bound`` is a dashed horizontal line.

    The vertical axis holds 0, and is 0 to 100% where ``unit`` is "percent".
    """

    title: str
    caption: str
    series: Sequence[Series]
    axis: StepAxis
    unit: Unit = "number"
    bound: float | None = None
    size: Size = "half"

    def readout(self) -> dict[str, Any]:
        """Return what the pointer shows: labels and colours, and all points with their text."""
        show = FORMATS[self.unit]
        return {
            "series": [[one.label, color_of(index)] for index, one in enumerate(self.series)],
            "points": [
                [
                    round(self.axis.place(point.phase, point.step), 4),
                    f"{'warm start, ' * (point.phase == 'warm_start')}step {point.step:g}",
                    index,
                    show(point.value) + f" ±{show(point.error)}" * bool(point.error),
                ]
                for index, series in enumerate(self.series)
                for point in series.thinned().points
            ],
        }


def _round_steps(num_steps: int, num_ticks: float) -> range:
    """Return steps from 0 on, at most about ``num_ticks``: 1, 2 or 5 times a power of ten apart."""
    least = max(1.0, num_steps / max(1, round(num_ticks)))
    power = 10 ** math.floor(math.log10(least))
    return range(0, num_steps + 1, next(n * power for n in (1, 2, 5, 10) if n * power >= least))
