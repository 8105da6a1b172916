"""The live view's picture of a run: a pure function of its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich import box
from rich.panel import Panel
from rich.text import Text

from paceline.controller.observe.files.records import EvaluationRecord, SampleRecord, StepRecord
from paceline.controller.observe.view.state import ViewState
from paceline.controller.observe.view.text import (
    count,
    duration,
    fit_line,
    is_number,
    number,
    percent,
    reward_mark,
    sparkline,
)

PHASE_TITLES: Mapping[str, str] = {"warm_start": "warm start", "train": "reinforcement learning"}
PART_COLORS = ("blue", "green", "cyan", "yellow", "magenta", "red", "white")
NAME_WIDTH = 12
MAX_WIDTH = 118
LEAST_SHARE = 0.005
"""Parts of the time under this share are drawn, but not named."""


def run_panel(state: ViewState, seconds: float, width: int, height: int) -> Panel:
    """Return the run in a frame of at most ``width`` columns and ``height`` lines.

    ``seconds`` is wall time since the start of the run. Rows that say least go first where the
    terminal is too low for all of them.
    """
    width = min(width, MAX_WIDTH)
    inner = width - 4
    room = max(8, inner - NAME_WIDTH)
    picture = Text(no_wrap=True, overflow="ellipsis")
    picture.append_text(_heading(state, inner))
    for name, value in list(_rows(state, room))[: max(0, height - 4)]:
        value.truncate(room, overflow="ellipsis")
        picture.append("\n").append(name.ljust(NAME_WIDTH), style="dim").append_text(value)
    return Panel(
        picture,
        title=Text(state.plan.name, style="bold"),
        title_align="left",
        subtitle=Text(duration(seconds), style="dim"),
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="dim",
        width=width,
    )


def _heading(state: ViewState, width: int) -> Text:
    """Return phase, bar, steps and time left, on one line."""
    last = state.last
    if last is None:
        return Text(fit_line(state.message, width) or "starting", style="bold")
    at_most = "at most " if last.phase == "warm_start" else ""
    title = Text(f"{PHASE_TITLES[last.phase]}  ", style="bold")
    numbers = Text.assemble(
        f"  {last.step} of {at_most}{state.total}",
        (f"  {number(state.seconds_per_step, '.2f')} s/step", "dim"),
        (f"  {at_most}{duration(state.seconds_left)} left", "bold cyan"),
    )
    room = max(4, width - len(title) - len(numbers))
    full = min(room, round(room * last.step / max(1, state.total)))
    bar = Text.assemble(("━" * full, "green"), ("─" * (room - full), "dim"))
    heading = Text.assemble(title, bar, numbers)
    heading.truncate(width, overflow="ellipsis")
    return heading


def _rows(state: ViewState, width: int) -> Iterator[tuple[str, Text]]:
    """Return name and content of every row that has something to say, the most telling first."""
    last = state.last
    if last is not None:
        yield from _learning_rows(state, last, width)
    validations = [record for record in state.evaluations if record.label == "validation"]
    held_out = [record for record in state.evaluations if record.label != "validation"]
    if validations and last is not None and last.phase == "warm_start":
        yield "validation", _evaluations(validations)
    if held_out:
        yield "held-out", _evaluations(held_out)
    if last is not None:
        yield from _machine_rows(state, last, width)
    if state.dropped:
        yield "dropped", Text(", ".join(f"{k} {count(v)}" for k, v in state.dropped.items()))
    if state.workers:
        yield "workers", _workers(state.workers)
    if state.message and last is not None:
        yield "now", Text(fit_line(state.message, width), style="italic")
    for index, sample in enumerate(reversed(state.samples)):
        yield "" if index else "samples", _sample(sample, width)


def _learning_rows(state: ViewState, last: StepRecord, width: int) -> Iterator[tuple[str, Text]]:
    curve_width = max(8, min(60, width - 20))
    if is_number(last.reward):
        spread = f" ±{number(last.reward_std, '.2f')}" if is_number(last.reward_std) else ""
        yield (
            "reward",
            Text.assemble(
                (sparkline(state.rewards, curve_width), "green"),
                (f"  {number(last.reward, '.2f')}", "bold"),
                (spread, "dim"),
            ),
        )
    else:
        yield (
            "loss",
            Text.assemble(
                (sparkline(state.losses, curve_width), "green"),
                (f"  {number(last.loss, '.4f')}", "bold"),
            ),
        )


def _machine_rows(state: ViewState, last: StepRecord, width: int) -> Iterator[tuple[str, Text]]:
    if is_number(last.length_p50):
        yield "length", _pairs({"p50": number(last.length_p50), "p99": number(last.length_p99)})
    rates = {
        "rollouts": count(last.rollout_tokens_per_second, ""),
        "learner": count(last.learner_tokens_per_second, ""),
    }
    if any(rates.values()):
        yield "tokens/s", _pairs(rates)
    if is_number(last.age_mean):
        yield "policy age", _age(last, state.plan.max_lag)
    shares = state.time_shares()
    if shares:
        yield "time", _time(shares, width)
    if last.buffer:
        yield "groups", _pairs({name: count(value) for name, value in last.buffer.items()})


def _pairs(pairs: Mapping[str, str]) -> Text:
    text = Text()
    for name, value in pairs.items():
        if value:
            text.append(f"{name} ", style="dim").append(f"{value}   ")
    return text


def _age(last: StepRecord, max_lag: int) -> Text:
    text = _pairs({"mean": number(last.age_mean, ".2f")})
    over = last.age_max is not None and last.age_max > max_lag
    text.append("max ", style="dim")
    text.append(f"{number(last.age_max)}", style="bold red" if over else "")
    return text.append(f"   bound {max_lag}", style="dim")


def _evaluations(evaluations: list[EvaluationRecord]) -> Text:
    """Return first, previous and last greedy accuracy, and first and last at temperature 1."""
    text = Text()
    for title, values in (
        ("greedy ", [e.greedy for e in evaluations if is_number(e.greedy)]),
        ("T=1 ", [e.sampled for e in evaluations if is_number(e.sampled)]),
    ):
        shown = values if len(values) <= 4 else [values[0], None, *values[-2:]]
        if shown:
            text.append(title, style="dim")
            text.append(" → ".join(percent(value, "…") for value in shown[:-1]), style="dim")
            text.append(" → " if len(shown) > 1 else "", style="dim")
            text.append(f"{percent(shown[-1])}   ", style="bold")
    return text


def _time(shares: Mapping[str, float], width: int) -> Text:
    """Return a bar of the shares of a step's wall time, and the shares in words."""
    bar, words = Text(), Text()
    bar_width = max(10, min(30, width // 4))
    drawn, reached = 0, 0.0
    for (part, share), color in zip(shares.items(), PART_COLORS, strict=False):
        reached += share
        cells = round(reached * bar_width) - drawn
        drawn += cells
        bar.append("█" * cells, style=color)
        if share < LEAST_SHARE:
            continue
        words.append("■ ", style=color).append(f"{part.replace('_', ' ')} ", style="dim")
        words.append(f"{share:.0%}  ")
    return Text.assemble(bar, "  ", words)


def _workers(workers: Mapping[str, str]) -> Text:
    text = Text()
    for name, state in workers.items():
        text.append(f"{fit_line(name, 24)} ", style="dim").append(f"{fit_line(state, 32)}   ")
    return text


def _sample(sample: SampleRecord, width: int) -> Text:
    mark = reward_mark(sample.reward)
    style = {"✓": "green", "✗": "red"}.get(mark, "yellow")
    share = max(8, (width - 8) // 2)
    return Text.assemble(
        (f"{mark} ", style),
        (fit_line(sample.prompt, share), "dim"),
        (" → ", "dim"),
        fit_line(sample.completion, share),
    )
