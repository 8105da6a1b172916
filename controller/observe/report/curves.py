"""Which curves a report shows, and what each of them says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from paceline.controller.observe.files.records import PHASES, EvaluationRecord, StepRecord
from paceline.controller.observe.report.charts import (
    HALF,
    THIRD,
    WIDE,
    Chart,
    Point,
    Series,
    Size,
    Style,
)
from paceline.controller.observe.report.data import RunData
from paceline.controller.observe.view.state import sequential_time, time_parts
from paceline.controller.observe.view.text import count, number

NUM_BARS = 80
"""Stacked charts show means of this many runs of neighbouring steps at most."""

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
    """What the run learned: held-out accuracy, reward, length, the warm start's loss."""
    train, warm = data.phase("train"), data.phase("warm_start")
    charts = [
        _accuracy(data),
        _chart(
            data,
            "Reward in training",
            "Mean over the samples trained on, dropped groups excluded. Bold: moving mean.",
            [_series("reward", "c1", train, lambda r: r.reward, "smooth")],
        ),
        _chart(
            data,
            "Completion length",
            "Tokens of a completion in training: half are at most p50, all but 1% at most p99.",
            [
                _series("p50", "c1", train, lambda r: r.length_p50, "smooth"),
                _series("p99", "c2", train, lambda r: r.length_p99, "smooth"),
            ],
        ),
        _chart(
            data,
            "Policy loss",
            "Its value says little in reinforcement learning; jumps do.",
            [_series("loss", "c1", train, lambda r: r.loss, "smooth")],
        ),
        _chart(
            data,
            "Warm-start loss",
            "Negative log-likelihood of the demonstrations, nats a token.",
            [_series("loss", "c1", warm, lambda r: r.loss, "smooth")],
        ),
    ]
    return _drawable(charts)


def learner_charts(data: RunData) -> list[Chart]:
    """One small chart for every number the learner reports, the well-known ones first."""
    found = {name for record in data.steps for name, v in record.metrics.items() if v is not None}
    known = [name for name in METRIC_TITLES if name in found]
    return _drawable([_metric(data, name) for name in [*known, *sorted(found - set(known))]])


def machine_charts(data: RunData) -> list[Chart]:
    """How the run kept its machines busy and its policy fresh."""
    train = data.phase("train")
    parts = list(sequential_time(train))
    charts = [
        _stack(
            data,
            "Wall time of a step",
            "Seconds by part, one after another. Generation and weight sync run beside these; "
            "evaluations and checkpoints are in other.",
            {part: [time_parts(record).get(part, 0.0) for record in train] for part in parts},
        ),
        _chart(
            data,
            "Policy age",
            "Weight versions between the oldest token of a sample and the step that trains on it.",
            [
                _series("oldest", "c2", train, lambda r: r.age_max, "step"),
                _series("mean", "c1", train, lambda r: r.age_mean, "smooth"),
            ],
            bound=(f"bound {data.summary.max_lag}", data.summary.max_lag),
        ),
        _chart(
            data,
            "Tokens per second",
            "Completion tokens that the rollout workers sample, tokens that the learner trains on.",
            [
                _series("rollouts", "c1", train, lambda r: r.rollout_tokens_per_second, "smooth"),
                _series("learner", "c2", train, lambda r: r.learner_tokens_per_second, "smooth"),
            ],
            format=count,
        ),
        _stack(
            data,
            "Dropped groups",
            "A step, by reason: these are generated but not trained on.",
            _dropped_by_reason(train),
        ),
        _chart(
            data,
            "Groups in the buffer",
            "Admitted and waiting for a worker, being generated, and finished.",
            _buffer(train),
        ),
    ]
    return _drawable(charts)


def _accuracy(data: RunData) -> Chart:
    ordered = sorted(data.evaluations, key=lambda e: (PHASES.index(e.phase), e.step))
    validations = [record for record in ordered if record.label == "validation"]
    others = " Validation, on other prompts, decides when the warm start ends." * bool(validations)
    evaluations = [record for record in ordered if record.label != "validation"]
    return _chart(
        data,
        "Held-out accuracy",
        f"Prompts that no training saw; whiskers are one standard error.{others}",
        [
            _measured("validation, greedy", "c7", validations, lambda e: (e.greedy, None)),
            _measured("T=1", "c2", evaluations, lambda e: (e.sampled, e.sampled_standard_error)),
            _measured("greedy", "c1", evaluations, lambda e: (e.greedy, e.standard_error)),
        ],
        format=lambda value: f"{100 * value:.3g}%",
        values=(0.0, 1.0),
        size=WIDE,
    )


def _metric(data: RunData, name: str) -> Chart:
    title, caption = METRIC_TITLES.get(name, (name.replace("_", " ").capitalize(), ""))
    points = _series(name, "c1", data.steps, lambda record: record.metrics.get(name), "smooth")
    return _chart(data, title, caption, [points], size=THIRD)


def _chart(
    data: RunData,
    title: str,
    caption: str,
    series: Sequence[Series],
    *,
    format: Callable[[float], str] = number,
    values: tuple[float, float] | None = None,
    bound: tuple[str, float] | None = None,
    size: Size = HALF,
) -> Chart:
    """A chart whose axis spans the phases that its curves have points in."""
    phases = {phase for one in series for phase, _, _ in one.points}
    return Chart(
        title=title,
        caption=caption,
        series=[one for one in series if one.points],
        num_warm=_num_steps(data, "warm_start") if "warm_start" in phases else 0,
        num_train=_num_steps(data, "train") if "train" in phases else 0,
        format=format,
        values=values,
        bound=bound,
        size=size,
    )


def _stack(data: RunData, title: str, caption: str, parts: dict[str, list[float]]) -> Chart:
    steps = data.phase("train")
    size = max(1, -(-len(steps) // NUM_BARS))
    series = []
    for index, (name, values) in enumerate(parts.items()):
        points: list[Point] = [
            (
                "train",
                steps[min(start + size, len(steps)) - 1].step,
                _mean(values[start : start + size]),
            )
            for start in range(0, len(values), size)
        ]
        series.append(Series(name.replace("_", " "), f"c{index % 7 + 1}", points))
    return Chart(title, caption, series, 0, _num_steps(data, "train"), kind="stack")


def _num_steps(data: RunData, phase: str) -> int:
    return max((record.step for record in data.steps if record.phase == phase), default=0)


def _drawable(charts: Iterable[Chart]) -> list[Chart]:
    """Charts that have something to show; the first of an odd number of half-width ones is wide."""
    drawable = [chart for chart in charts if any(one.points for one in chart.series)]
    halves = [index for index, chart in enumerate(drawable) if chart.size == HALF]
    if len(halves) % 2:
        drawable[halves[0]] = replace(drawable[halves[0]], size=WIDE)
    return drawable


def _series(
    name: str,
    color: str,
    steps: Sequence[StepRecord],
    value: Callable[[StepRecord], float | None],
    style: Style = "line",
) -> Series:
    pairs = ((record, value(record)) for record in steps)
    points: list[Point] = [(r.phase, r.step, found) for r, found in pairs if found is not None]
    return Series(name, color, points, style)


def _measured(
    name: str,
    color: str,
    evaluations: Sequence[EvaluationRecord],
    value: Callable[[EvaluationRecord], tuple[float | None, float | None]],
) -> Series:
    found = [(record, *value(record)) for record in evaluations]
    shown = [(record, accuracy, error) for record, accuracy, error in found if accuracy is not None]
    return Series(
        name,
        color,
        [(record.phase, record.step, accuracy) for record, accuracy, _ in shown],
        "dots",
        [error for _, _, error in shown],
    )


def _buffer(steps: Sequence[StepRecord]) -> list[Series]:
    return [
        _series(name, f"c{index % 7 + 1}", steps, partial(_buffered, name), "smooth")
        for index, name in enumerate(_names(record.buffer for record in steps))
    ]


def _buffered(name: str, record: StepRecord) -> float | None:
    return record.buffer.get(name)


def _dropped_by_reason(steps: Sequence[StepRecord]) -> dict[str, list[float]]:
    return {
        reason: [record.dropped.get(reason) or 0.0 for record in steps]
        for reason in _names(record.dropped for record in steps)
    }


def _names(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    """Every key of the mappings once, in order of first appearance."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
