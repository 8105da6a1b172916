"""The top of a report: name, status, accuracy before and after, and the run in six numbers."""

from __future__ import annotations

from collections.abc import Iterable

from paceline.controller.observe.files.summary import STATUS_WORDS
from paceline.controller.observe.report.data import RunData
from paceline.controller.observe.report.markup import Markup, join, tag
from paceline.controller.observe.report.scales import Scale
from paceline.controller.observe.view.text import count, duration, number, percent

STATUS_STYLES = {"finished": "good", "solved": "good", "interrupted": "warn", "failed": "bad"}
ACCURACIES = (("greedy", "Held-out accuracy, greedy"), ("sampled", "Held-out accuracy, T = 1"))


def heading(data: RunData) -> Markup:
    """Name, status and what was trained on what."""
    status = data.summary.status if data.has_summary else "unfinished"
    style = STATUS_STYLES.get(status, "warn")
    return join(
        [
            tag(
                "div",
                tag("h1", data.name),
                tag("span", status, class_=f"pill {style}"),
                class_="head",
            ),
            tag("p", " · ".join(_description(data)), class_="muted"),
            _error(data),
        ]
    )


def headline(data: RunData) -> Markup:
    """Accuracy before and after, and the run in six numbers."""
    cards = [_change(data, kind, title) for kind, title in ACCURACIES]
    tiles = [
        tag("div", tag("b", value), tag("span", name), class_="card")
        for value, name in _tiles(data)
    ]
    return join(
        [
            tag("section", cards, class_="grid hero"),
            tag("section", tiles, class_="tiles"),
        ]
    )


def _description(data: RunData) -> Iterable[str]:
    """The run in a few words, as far as its configuration tells."""
    source = data.setting("data", "source", "task") or data.setting("data", "source", "path")
    model = data.setting("model", "path") or data.setting("model", "architecture", "model_type")
    ranks = data.setting("learner", "num_ranks")
    workers = data.setting("rollout", "num_workers")
    started = str(data.versions.get("started", "")).replace("T", " ").replace("+00:00", " UTC")
    words = (
        (source, f"{source}"),
        (model, f"model {model}"),
        (workers, f"{workers} rollout worker{'s' if workers != 1 else ''}"),
        (ranks, f"{ranks} learner rank{'s' if ranks != 1 else ''}"),
        (True, f"max lag {data.summary.max_lag}"),
        (started, started),
    )
    return [text for value, text in words if value]


def _error(data: RunData) -> Markup | None:
    if not data.summary.error:
        return None
    return tag("p", f"{STATUS_WORDS['failed']}: {data.summary.error}", class_="bad")


def _change(data: RunData, kind: str, title: str) -> Markup:
    """One accuracy before and after, in figures and on a track from 0 to 100%."""
    before, after = (getattr(data.summary, f"{kind}_{when}") for when in ("before", "after"))
    big = [
        tag("span", percent(before, "?"), class_="from"),
        tag("span", "→", class_="arrow"),
        tag("span", percent(after, "?")),
    ]
    if before is not None and after is not None:
        gain = 100 * (after - before)
        big.append(tag("small", f"{gain:+.1f} points", class_="good" if gain > 0 else "bad"))
    return tag(
        "div",
        tag("p", title, class_="muted"),
        tag("div", big, class_="big"),
        _track(data, kind),
        tag("p", _errors(data, kind), class_="muted", style="font-size:13px"),
        class_="card half",
    )


def _track(data: RunData, kind: str) -> Markup:
    x = Scale(0, 1, 0, 500)
    parts = [tag("rect", class_="track", x=0, y=9, width=500, height=6, rx=3)]
    values = []
    for when, color in (("before", "c7"), ("after", "c1")):
        value = getattr(data.summary, f"{kind}_{when}")
        if value is None:
            continue
        error = data.summary.standard_errors.get(f"{kind}_{when}") or 0.0
        values.append(value)
        ends = {"x1": x(max(0, value - error)), "x2": x(min(1, value + error))}
        parts.append(tag("line", class_=f"whisker {color}", y1=12, y2=12, stroke_width=3, **ends))
        parts.append(tag("circle", class_=f"dot {color}", cx=x(value), cy=12, r=7))
    if len(values) == 2:
        low, high = sorted(map(x, values))
        span = tag("rect", class_="span c1", x=low, y=9, width=high - low, height=6)
        parts.insert(1, span)
    return tag("svg", parts, viewBox="-8 0 516 24", role="presentation")


def _errors(data: RunData, kind: str) -> str:
    names = [f"{kind}_{when}" for when in ("before", "after")]
    if all(getattr(data.summary, name) is None for name in names):
        return "not measured"
    found = [data.summary.standard_errors.get(name) for name in names]
    errors = " and ".join(f"±{100 * error:.1f}" for error in found if error is not None)
    return f"{data.summary.num_held_out} prompts; standard error {errors or 'unknown'} points"


def _tiles(data: RunData) -> list[tuple[str, str]]:
    summary = data.summary
    warm = data.phase("warm_start")
    steps = f"steps, after {warm[-1].step} of warm start" if warm else "optimiser steps"
    age = "greatest policy age" + f", bound {summary.max_lag}"
    return [
        (str(summary.steps), steps),
        (duration(summary.wall_seconds.get("total")), "wall time"),
        (count(summary.tokens.get("trained")), "completion tokens trained"),
        (count(data.median("rollout_tokens_per_second")), "tokens/s sampled, median"),
        (count(data.median("learner_tokens_per_second")), "tokens/s trained, median"),
        (number(summary.max_age, ".0f"), age),
    ]
