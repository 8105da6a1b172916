"""Runs beside each other: held-out accuracy by step, as a table and as a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from paceline.configs.errors import ConfigError
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import write_atomically
from paceline.controller.observe.files.recorder import read_records
from paceline.controller.observe.files.records import WARM_START_LABELS, EvaluationRecord
from paceline.controller.observe.report.charts import Chart, Point, Series, Size
from paceline.controller.observe.report.markup import Markup, tag
from paceline.controller.observe.report.stylesheet import STYLE

COLORS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7")
SIZE = Size(width=760, height=320)
LEGEND_LINE = 18
"""Height of a line of the legend, in CSS pixels."""

Curve = Mapping[int, float]
"""Accuracy, 0 to 1, by step."""


def compare_runs(runs: Sequence[Path], output: Path) -> None:
    """Print the greedy held-out accuracy of runs and draw it into an SVG file.

    Raises:
        ConfigError: a folder holds no evaluated run, or there are more than can be told apart.
    """
    if len(runs) > len(COLORS):
        raise ConfigError(f"{len(runs)} runs cannot be told apart, give at most {len(COLORS)}")
    curves = {run.name: held_out_curve(run) for run in runs}
    Console().print(comparison_table(curves))
    write_atomically(output, drawing("held-out accuracy, greedy", curves))
    Console().print(str(output), soft_wrap=True, highlight=False)


def held_out_curve(run: Path) -> Curve:
    """Greedy accuracy at every step at which a run was evaluated.

    Raises:
        ConfigError: it was never evaluated.
    """
    curve = {
        record.step: record.greedy
        for record in read_records(RunFolder.open(run))
        if isinstance(record, EvaluationRecord)
        and record.label not in WARM_START_LABELS
        and record.greedy is not None
    }
    if not curve:
        raise ConfigError(f"{run} was never evaluated on held-out prompts: nothing to compare")
    return curve


def comparison_table(curves: Mapping[str, Curve]) -> Table:
    """A row a run, a column a step."""
    steps = sorted({step for curve in curves.values() for step in curve})
    table = Table(title="held-out accuracy, greedy, %", title_justify="left")
    table.add_column("run")
    for step in steps:
        table.add_column(str(step), justify="right")
    for name, curve in curves.items():
        cells = (f"{100 * curve[step]:.1f}" if step in curve else "" for step in steps)
        table.add_row(name, *cells)
    return table


def drawing(title: str, curves: Mapping[str, Curve]) -> str:
    """An SVG file with its own style, readable on light and dark pages."""
    series = [
        Series(name, color, _points(curve), "dots")
        for (name, curve), color in zip(curves.items(), COLORS, strict=False)
    ]
    num_steps = max(step for curve in curves.values() for step in curve)
    chart = Chart(
        title, "", series, 0, num_steps, format=lambda v: f"{v:.0%}", values=(0.0, 1.0), size=SIZE
    )
    legend = [
        tag(
            "g",
            tag("rect", class_=one.color, width=10, height=10, fill="var(--c)", x=SIZE.left, y=y),
            tag("text", one.name, x=SIZE.left + 16, y=y + 9, class_="tick"),
        )
        for y, one in zip(_legend_lines(len(series)), series, strict=True)
    ]
    height = SIZE.height + LEGEND_LINE * len(series) + 8
    drawn = chart.svg().replace("<svg ", f'<svg width="{SIZE.width:g}" height="{SIZE.height:g}" ')
    return tag(
        "svg",
        tag("style", Markup(STYLE)),
        tag("rect", width=SIZE.width, height=height, fill="var(--card)"),
        Markup(drawn),
        legend,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {SIZE.width:g} {height:g}",
    )


def _points(curve: Curve) -> list[Point]:
    return [("train", step, value) for step, value in sorted(curve.items())]


def _legend_lines(count: int) -> list[float]:
    return [SIZE.height + LEGEND_LINE * index for index in range(count)]
