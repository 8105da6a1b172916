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
from paceline.controller.observe.report.charts import NUM_COLORS, Chart, Point, Series, StepAxis
from paceline.controller.observe.report.report import read_template
from paceline.controller.observe.report.vega_lite import svg, vega_lite

Curve = Mapping[int, float]
"""Accuracy, 0 to 1, by step."""


def compare_runs(runs: Sequence[Path], output: Path) -> None:
    """Print the greedy held-out accuracy of runs and draw it into an SVG file.

    Raises:
        ConfigError: a folder holds no evaluated run, or there are more than can be told apart.
    """
    if len(runs) > NUM_COLORS:
        raise ConfigError(f"{len(runs)} runs cannot be told apart, give at most {NUM_COLORS}")
    curves = {run.name: held_out_curve(run) for run in runs}
    Console().print(comparison_table(curves))
    write_atomically(output, drawing("held-out accuracy, greedy", curves))
    Console().print(str(output), soft_wrap=True, highlight=False)


def held_out_curve(run: Path) -> Curve:
    """Return greedy accuracy at every step at which a run was evaluated.

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
    """Return a table with a row a run and a column a step."""
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
    """Return an SVG file with its own style, readable on light and dark pages."""
    series = [
        Series(name, [Point("train", step, value) for step, value in sorted(curve.items())], "dots")
        for name, curve in curves.items()
    ]
    axis = StepAxis(0, max(step for curve in curves.values() for step in curve))
    chart = Chart(title, "", series, axis, unit="percent", size="file")
    page = {
        "background": "var(--card)",
        "padding": 16,
        "title": {"text": title, "color": "var(--ink)", "anchor": "start"},
    }
    style = f"<style>{read_template('theme.css')}</style>"
    return svg(vega_lite(chart) | page).replace(">", f">{style}", 1)
