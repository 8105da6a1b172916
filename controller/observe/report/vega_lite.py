"""A chart as a Vega-Lite specification, and its SVG, which is drawn without a browser.

Colours are the variables of ``theme.css``, so that a drawing follows the theme of its page.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from paceline.controller.observe.report.charts import Chart, Series, Size, Style, Unit, color_of

Json = dict[str, Any]

SIZES: dict[Size, tuple[int, int]] = {
    "wide": (1036, 240),
    "half": (482, 190),
    "third": (292, 130),
    "file": (700, 280),
}
"""Width and height in CSS pixels, without the axes' labels and the legend."""
TICK_LABELS: dict[Unit, str] = {
    "number": "abs(datum.value) < 1e-4 && datum.value || abs(datum.value) >= 1e5"
    " ? format(datum.value, '.2~e') : format(datum.value, '.5~r')",
    "count": "format(datum.value, '~s')",
    "percent": "format(datum.value, '~%')",
}
CONFIG: Json = {
    "background": None,
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif",
    "aria": False,
    "view": {"stroke": None},
    "line": {"strokeCap": "round", "strokeJoin": "round"},
    "circle": {"opacity": 1, "size": 55},
    "axis": {
        "domain": False,
        "ticks": False,
        "title": None,
        "gridColor": "var(--line)",
        "labelColor": "var(--muted)",
        "labelFontSize": 11.5,
        "labelPadding": 6,
        "labelFlush": False,
    },
    "axisX": {"grid": False},
    "axisY": {"minExtent": 46, "maxExtent": 46},
    "legend": {
        "title": None,
        "orient": "top",
        "symbolOpacity": 1,
        "symbolStrokeWidth": 3,
        "labelColor": "var(--ink)",
        "labelFontSize": 13,
        "labelLimit": 240,
        "columnPadding": 24,
    },
}


def svg(specification: Json) -> str:
    """Return the drawing, an ``<svg>`` element that needs no script and loads nothing."""
    import vl_convert  # late: it brings a JavaScript engine

    return vl_convert.vegalite_to_svg(specification, allowed_base_urls=[])


def vega_lite(chart: Chart) -> Json:
    """Return the specification of a chart."""
    width, height = SIZES[chart.size]
    ticks = chart.axis.ticks(width // 75)
    places, labels = list(ticks), list(ticks.values())
    x = {
        "field": "x",
        "type": "quantitative",
        "scale": {"domain": [0, 1]},
        "axis": {"values": places, "labelExpr": f"{labels}[indexof({places}, datum.value)]"},
    }
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": width,
        "height": height,
        "padding": {"left": 0, "top": 5, "right": 12, "bottom": 0},
        "config": CONFIG,
        "encoding": {"x": x},
        "layer": [*_warm_start(chart.axis.border), *_curves(chart), *_bound(chart.bound)],
    }


def _warm_start(border: float) -> list[Json]:
    """Return the warm start's segment, shaded and named."""
    if not border:
        return []
    start = {"values": [{"x": 0}]}
    shade = {"type": "rect", "color": "var(--shade)"}
    words = {"type": "text", "text": "warm start", "fontStyle": "italic", "color": "var(--muted)"}
    above = {"align": "left", "baseline": "bottom", "dy": -3}
    return [
        {"data": start, "mark": shade, "encoding": {"x2": {"datum": border}}},
        {"data": start, "mark": words | above, "encoding": {"y": {"value": 0}}},
    ]


def _bound(bound: float | None) -> list[Json]:
    """Return a dashed line over the whole width, and its name."""
    if bound is None:
        return []
    one: Json = {"values": [{}]}
    color = {"color": "var(--bad)"}
    line = {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 1.25}
    words = {"type": "text", "text": f"bound {bound:g}", "align": "right", "dy": -8}
    at: Json = {"y": {"datum": bound}, "x": {"value": "width"}}
    return [
        {"data": one, "mark": line | color, "encoding": at | {"x2": {"value": 0}}},
        {"data": one, "mark": words | color, "encoding": at},
    ]


def _curves(chart: Chart) -> list[Json]:
    """Return a layer for each series, or one for all areas."""
    width, height = SIZES[chart.size]
    labels, num_ticks = [one.label for one in chart.series], round(height / 45)
    columns = width // (45 + 7 * max(map(len, labels)))
    color = {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": labels, "range": [color_of(index) for index in range(len(labels))]},
        "legend": {"columns": max(1, columns)} if len(labels) > 1 else None,
    }
    y: Json = {
        "type": "quantitative",
        "scale": {"domain": [0, 1]} if chart.unit == "percent" else {"nice": num_ticks},
        "axis": {"tickCount": num_ticks, "labelExpr": TICK_LABELS[chart.unit]},
    }
    encoding: Json = {"color": color, "detail": {"field": "phase"}}
    rows = [_rows(chart, one.thinned(), order) for order, one in enumerate(chart.series)]
    if chart.series[0].style == "area":
        encoding |= {"y": y | {"field": "value"}, "order": {"field": "order"}}
        data = {"values": list(chain.from_iterable(rows))}
        return [{"data": data, "mark": {"type": "area", "opacity": 0.85}, "encoding": encoding}]
    return [
        {"data": {"values": own}, "encoding": encoding, "layer": _marks(one.style, len(own), y)}
        for one, own in zip(chart.series, rows, strict=True)
    ]


def _rows(chart: Chart, series: Series, order: int) -> list[Json]:
    """Return the points of a series; only dots are joined across the two phases."""
    return [
        {
            "x": chart.axis.place(point.phase, point.step),
            "series": series.label,
            "order": order,
            "phase": None if series.style == "dots" else point.phase,
            "value": point.value,
            "low": point.value - point.error,
            "high": point.value + point.error,
        }
        for point in series.points
    ]


def _marks(style: Style, num_points: int, y: Json) -> list[Json]:
    """Return what a series is drawn with."""
    value = {"y": y | {"field": "value"}}
    dot = {"mark": "circle", "encoding": value}
    if style == "dots":
        whisker = {"y": y | {"field": "low"}, "y2": {"field": "high"}}
        return [
            {"mark": {"type": "line", "strokeWidth": 1.75}, "encoding": value},
            {"mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": whisker},
            dot,
        ]
    if num_points == 1:
        return [dot]
    if style == "steps":
        return [{"mark": {"type": "line", "interpolate": "step-after"}, "encoding": value}]
    reach = max(1, num_points // 50)
    mean = {"window": [{"op": "mean", "field": "value", "as": "mean"}], "groupby": ["phase"]}
    faint = {"type": "line", "strokeWidth": 1, "opacity": 0.32}
    return [
        {"mark": faint, "encoding": value},
        {
            "transform": [mean | {"frame": [-reach, reach]}],
            "mark": "line",
            "encoding": {"y": y | {"field": "mean"}},
        },
    ]
