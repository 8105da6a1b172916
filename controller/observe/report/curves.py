"""Which curves a report shows, and what each of them says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

from paceline.controller.observe.files.records import PHASES, EvaluationRecord, StepRecord
from paceline.controller.observe.report.charts import (
    Chart,
    Point,
    Series,
    Size,
    StepAxis,
    Style,
    Unit,
)
from paceline.controller.observe.report.data import RunData
from paceline.controller.observe.view.state import time_parts

METRIC_TITLES = {
    "entropy": ("Entropy", "nats a token"),
    "kl": ("KL divergence", "from the sampling to the current policy, nats a token"),
    "clip_fraction": (
        "Clipped tokens",
        "share of trained tokens that clipping took the gradient of",
    ),
    "ratio": ("Mean ratio", "of a token's current to its sampling probability"),
    "ratio_max": ("Largest ratio", "of any token's current to its sampling probability"),
    "mismatch": ("Mean mismatch", "of current and sampling log-probability, nats"),
    "mismatch_max": ("Largest mismatch", "of current and sampling log-probability, nats"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", ""),
    "padding_fraction": ("Padding", "share of the learner's tokens"),
}


def learning_charts(data: RunData) -> list[Chart]:
    """Return what the run learned: held-out accuracy, reward, length, losses."""
    chart, train, warm = partial(_chart, data), data.phase("train"), data.phase("warm_start")
    return _drawable(
        _accuracy(data),
        chart(
            "Reward in training",
            "Mean over the samples trained on, dropped groups excluded. Bold: moving mean.",
            [_series("reward", train, "reward")],
        ),
        chart(
            "Completion length",
            "Tokens of a completion in training: half are at most p50, all but 1% at most p99.",
            [_series(name, train, f"length_{name}") for name in ("p50", "p99")],
        ),
        chart(
            "Policy loss",
            "Its value says little in reinforcement learning; jumps do.",
            [_series("loss", train, "loss")],
        ),
        chart(
            "Warm-start loss",
            "Negative log-likelihood of the demonstrations, nats a token.",
            [_series("loss", warm, "loss")],
        ),
    )


def learner_charts(data: RunData) -> list[Chart]:
    """Return a small chart for every number the learner reports, the well-known ones first."""
    curves = {
        one.name: one
        for one in _by_key(data.steps, [record.metrics for record in data.steps], "smooth")
    }
    known = [name for name in METRIC_TITLES if name in curves]
    charts = []
    for name in [*known, *sorted(curves.keys() - set(known))]:
        title, caption = METRIC_TITLES.get(name, (_words(name).capitalize(), ""))
        charts.append(_chart(data, title, caption, [curves[name]], size="third"))
    return _drawable(*charts)


def machine_charts(data: RunData) -> list[Chart]:
    """Return how the run kept its machines busy and its policy fresh."""
    chart, train = partial(_chart, data), data.phase("train")
    return _drawable(
        chart(
            "Wall time of a step",
            "Seconds by part, one after another. Generation and weight sync run beside these; "
            "evaluations and checkpoints are in other.",
            _by_key(train, map(time_parts, train), "area"),
        ),
        chart(
            "Policy age",
            "Weight versions between the oldest token of a sample and the step that trains on it.",
            [
                _series("mean", train, "age_mean"),
                _series("oldest", train, "age_max", "steps"),
            ],
            bound=data.summary.max_lag,
        ),
        chart(
            "Tokens per second",
            "Completion tokens that the rollout workers sample, tokens that the learner trains on.",
            [
                _series("rollouts", train, "rollout_tokens_per_second"),
                _series("learner", train, "learner_tokens_per_second"),
            ],
            unit="count",
        ),
        chart(
            "Dropped groups",
            "A step, by reason: these are generated but not trained on.",
            _by_key(train, [record.dropped for record in train], "area"),
        ),
        chart(
            "Groups in the buffer",
            "Admitted and waiting for a worker, being generated, and finished.",
            _by_key(train, [record.buffer for record in train], "smooth"),
        ),
    )


def _accuracy(data: RunData) -> Chart:
    records = sorted(data.evaluations, key=lambda e: (PHASES.index(e.phase), e.step))
    validations = [record for record in records if record.label == "validation"]
    held_out = [record for record in records if record.label != "validation"]
    others = " Validation, on other prompts, decides when the warm start ends." * bool(validations)
    return _chart(
        data,
        "Held-out accuracy",
        f"Prompts that no training saw; whiskers are one standard error.{others}",
        [
            _series("greedy", held_out, "greedy", "dots", "standard_error"),
            _series("T=1", held_out, "sampled", "dots", "sampled_standard_error"),
            _series("validation, greedy", validations, "greedy", "dots"),
        ],
        unit="percent",
        size="wide",
    )


def _chart(
    data: RunData,
    title: str,
    caption: str,
    series: Iterable[Series],
    *,
    unit: Unit = "number",
    bound: float | None = None,
    size: Size = "half",
) -> Chart:
    """Return a chart whose axis spans the phases that its curves have points in."""
    shown = [replace(one, name=_words(one.name)) for one in series if one.points]
    phases = {point.phase for one in shown for point in one.points}
    num_steps = {phase: record.step for record in data.steps if (phase := record.phase) in phases}
    axis = StepAxis(num_steps.get("warm_start", 0), num_steps.get("train", 0))
    return Chart(title, caption, shown, axis, unit, bound, size)


def _drawable(*charts: Chart) -> list[Chart]:
    """Return those that show something; the first of an odd number of half-width ones is wide."""
    drawable = [chart for chart in charts if chart.series]
    halves = [index for index, chart in enumerate(drawable) if chart.size == "half"]
    if len(halves) % 2:
        drawable[halves[0]] = replace(drawable[halves[0]], size="wide")
    return drawable


def _series(
    name: str,
    records: Sequence[StepRecord | EvaluationRecord],
    value: str,
    style: Style = "smooth",
    error: str = "",
) -> Series:
    """Return what was measured of the attribute ``value``; ``error`` names that of its error."""
    points = [
        Point(record.phase, record.step, getattr(record, value), getattr(record, error, None) or 0)
        for record in records
        if getattr(record, value) is not None
    ]
    return Series(name, points, style)


def _by_key(
    steps: Sequence[StepRecord], rows: Iterable[Mapping[str, float | None]], style: Style
) -> list[Series]:
    """Return a series for every key, in order of appearance; areas are 0 where it is missing."""
    rows = list(rows)
    missing = dict.fromkeys(chain.from_iterable(rows), 0.0 if style == "area" else None)
    full = [missing | {key: n for key, n in row.items() if n is not None} for row in rows]
    return [
        Series(
            name,
            [
                Point(step.phase, step.step, value)
                for step, row in zip(steps, full, strict=True)
                if (value := row[name]) is not None
            ],
            style,
        )
        for name in missing
    ]


def _words(name: str) -> str:
    return name.replace("_", " ")
