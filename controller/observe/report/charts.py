"""Curves as inline SVG. Colours come from the page's style sheet, so that they follow its theme."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from paceline.controller.observe.files.records import PHASES, Phase
from paceline.controller.observe.report.markup import Markup, join, tag
from paceline.controller.observe.report.scales import Scale, StepAxis, value_range
from paceline.controller.observe.view.text import number

MAX_POINTS = 400
"""Longer curves are drawn as means of neighbouring steps."""

Style = Literal["line", "smooth", "dots", "step"]

Point = tuple[Phase, float, float]
"""Phase, step and value."""


@dataclass(frozen=True)
class Series:
    """One curve. ``color`` is a class of the style sheet (``c1`` to ``c7``).

    ``line`` joins the points, ``smooth`` draws them faintly under their moving mean, ``dots``
    marks and joins them with whiskers of ``errors``, ``step`` holds each value to the next.
    """

    name: str
    color: str
    points: Sequence[Point]
    style: Style = "line"
    errors: Sequence[float | None] = ()


@dataclass(frozen=True)
class Size:
    """A chart's extent in CSS pixels."""

    width: float = 540
    height: float = 230
    left: float = 46
    right: float = 12
    top: float = 18
    bottom: float = 24

    @property
    def num_ticks(self) -> int:
        """About how many ticks the vertical axis has room for."""
        return max(2, round((self.height - self.top - self.bottom) / 45))


WIDE = Size(width=1100, height=280)
HALF = Size()
THIRD = Size(width=350, height=170, left=48, right=10)


@dataclass(frozen=True)
class Chart:
    """Curves over a run's steps. ``num_warm`` 0 leaves the warm start out of the axis.

    ``kind`` "stack" piles the series up instead of drawing lines (their points must agree in
    phase and step). ``bound`` is a dashed horizontal line with its name.
    """

    title: str
    caption: str
    series: Sequence[Series]
    num_warm: int
    num_train: int
    kind: Literal["lines", "stack"] = "lines"
    format: Callable[[float], str] = number
    values: tuple[float, float] | None = None
    bound: tuple[str, float] | None = None
    size: Size = HALF

    def svg(self) -> Markup:
        """The drawing, readable without scripts; ``data-points`` feeds the page's tooltip."""
        drawn = [_thinned(series) for series in self.series if series.points]
        axis = StepAxis(
            self.num_warm, self.num_train, self.size.left, self.size.width - self.size.right
        )
        low, high = self.values or _extent(drawn, self)
        y = Scale(low, high, self.size.height - self.size.bottom, self.size.top)
        bodies = _stack(drawn, axis, y) if self.kind == "stack" else _lines(drawn, axis, y)
        return tag(
            "svg",
            tag("title", self.title),
            _frame(self, axis, y),
            bodies,
            _bound(self, axis, y),
            tag("line", class_="cursor", y1=self.size.top, y2=y.start, x1=-9, x2=-9),
            viewBox=f"0 0 {self.size.width:g} {self.size.height:g}",
            role="img",
            data_points=json.dumps(
                _readout(drawn, axis, self.format), ensure_ascii=False, separators=(",", ":")
            ),
        )


def _extent(series: Sequence[Series], chart: Chart) -> tuple[float, float]:
    """The range of values a chart must show."""
    values = [value for one in series for _, _, value in one.points]
    if chart.kind == "stack":
        values = [math.fsum(column) for column in zip(*map(_values, series), strict=True)]
    if chart.bound:
        values.append(chart.bound[1] * 1.15)
    return value_range(values, chart.size.num_ticks)


def _values(series: Series) -> list[float]:
    return [value for _, _, value in series.points]


def _thinned(series: Series) -> Series:
    """The series with at most ``MAX_POINTS`` points a phase, each the mean of its neighbours."""
    if len(series.points) <= MAX_POINTS or series.style == "dots":
        return series
    size = math.ceil(len(series.points) / MAX_POINTS)
    points: list[Point] = []
    for own in _by_phase(series.points):
        for start in range(0, len(own), size):
            part = own[start : start + size]
            mean = math.fsum(value for _, _, value in part) / len(part)
            points.append((part[0][0], part[-1][1], mean))
    return Series(series.name, series.color, points, series.style)


def _frame(chart: Chart, axis: StepAxis, y: Scale) -> Markup:
    """Grid, ticks and the warm start's own segment."""
    parts = []
    if axis.num_warm:
        shade = {"x": axis.start, "y": y.end, "height": y.start - y.end}
        parts.append(tag("rect", class_="warm", width=axis.border - axis.start, **shade))
        parts.append(tag("text", "warm start", class_="warm", x=axis.start, y=y.end - 4))
    for tick in y.ticks(chart.size.num_ticks):
        at = y(tick)
        parts.append(tag("line", class_="grid", x1=axis.start, x2=axis.end, y1=at, y2=at))
        label = chart.format(tick)
        parts.append(tag("text", label, class_="tick end", x=axis.start - 6, y=at + 4))
    for at, step in axis.ticks():
        parts.append(tag("text", str(step), class_="tick mid", x=at, y=chart.size.height - 7))
    return tag("g", parts)


def _bound(chart: Chart, axis: StepAxis, y: Scale) -> Markup | None:
    if chart.bound is None:
        return None
    name, value = chart.bound
    at = y(value)
    return tag(
        "g",
        tag("line", class_="bound", x1=axis.start, x2=axis.end, y1=at, y2=at),
        tag("text", name, class_="tick end bound", x=axis.end, y=at - 5),
    )


def _lines(series: Sequence[Series], axis: StepAxis, y: Scale) -> Markup:
    return join(_curve(one, axis, y) for one in series)


def _curve(series: Series, axis: StepAxis, y: Scale) -> Markup:
    """One series; a phase's points are never joined to the other phase's, unless it has dots."""
    if series.style == "dots":
        return _dots(series, axis, y)
    parts = []
    for points in _by_phase(series.points):
        if series.style == "smooth" and len(points) > 8:
            parts.append(_path(points, axis, y, f"line faint {series.color}"))
            points = _moving_mean(points)
        is_step = series.style == "step"
        parts.append(_path(points, axis, y, f"line {series.color}", is_step))
    return tag("g", parts)


def _by_phase(points: Sequence[Point]) -> list[list[Point]]:
    """The points of each phase that has any."""
    phases = ([point for point in points if point[0] == phase] for phase in PHASES)
    return [points for points in phases if points]


def _path(
    points: Sequence[Point], axis: StepAxis, y: Scale, class_: str, is_step: bool = False
) -> Markup:
    if len(points) == 1:
        phase, step, value = points[0]
        dot = f"dot {class_.split()[-1]}"
        return tag("circle", class_=dot, cx=axis.scale(phase)(step), cy=y(value), r=2)
    xy = [(axis.scale(phase)(step), y(value)) for phase, step, value in points]
    if is_step:
        xy = [xy[0], *(corner for a, b in pairwise(xy) for corner in ((b[0], a[1]), b))]
    return tag("polyline", class_=class_, points=" ".join(f"{px:.1f},{py:.1f}" for px, py in xy))


def _dots(series: Series, axis: StepAxis, y: Scale) -> Markup:
    parts = [_path(series.points, axis, y, f"line thin {series.color}")]
    for index, (phase, step, value) in enumerate(series.points):
        px, py = axis.scale(phase)(step), y(value)
        error = series.errors[index] if index < len(series.errors) else None
        if error:
            whisker = {"y1": y(value - error), "y2": y(value + error)}
            parts.append(tag("line", class_=f"whisker {series.color}", x1=px, x2=px, **whisker))
        parts.append(tag("circle", class_=f"dot {series.color}", cx=px, cy=py, r=4.5))
    return tag("g", parts)


def _moving_mean(points: Sequence[Point]) -> list[Point]:
    """Each value as the mean of the steps around it: a twenty-fifth of the curve, centred."""
    reach = max(1, len(points) // 50)
    values = [value for _, _, value in points]
    smooth = []
    for index, (phase, step, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        window = values[index - near : index + near + 1]
        smooth.append((phase, step, math.fsum(window) / len(window)))
    return smooth


def _stack(series: Sequence[Series], axis: StepAxis, y: Scale) -> Markup:
    """Areas piled up in the order given."""
    floor = [0.0] * max((len(one.points) for one in series), default=0)
    parts = []
    for one in series:
        top = [low + value for low, value in zip(floor, _values(one), strict=True)]
        xs = [axis.scale(phase)(step) for phase, step, _ in one.points]
        upper = [f"{px:.1f},{y(value):.1f}" for px, value in zip(xs, top, strict=True)]
        lower = [f"{px:.1f},{y(value):.1f}" for px, value in zip(xs, floor, strict=True)]
        outline = " ".join([*upper, *reversed(lower)])
        parts.append(tag("polygon", class_=f"area {one.color}", points=outline))
        floor = top
    return tag("g", parts)


def _readout(
    series: Sequence[Series], axis: StepAxis, format_: Callable[[float], str]
) -> dict[str, object]:
    """What the tooltip says: ``[x, heading, text of each series or null]`` for every step drawn."""
    columns: dict[tuple[Phase, float], list[str | None]] = {}
    for column, one in enumerate(series):
        for index, (phase, step, value) in enumerate(one.points):
            error = one.errors[index] if index < len(one.errors) else None
            row = columns.setdefault((phase, step), [None] * len(series))
            row[column] = format_(value) + (f" ±{format_(error)}" if error else "")
    order = sorted(columns, key=lambda key: (PHASES.index(key[0]), key[1]))
    return {
        "series": [[one.color, one.name] for one in series],
        "points": [
            [round(axis.scale(phase)(step), 1), _heading(phase, step), *columns[phase, step]]
            for phase, step in order
        ],
    }


def _heading(phase: Phase, step: float) -> str:
    return f"warm start, step {step:g}" if phase == "warm_start" else f"step {step:g}"
