"""The body of a report: curves, examples, notes, and how to reproduce the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paceline.controller.observe.files.records import ExampleRecord, Generation
from paceline.controller.observe.report.charts import HALF, THIRD, Chart
from paceline.controller.observe.report.data import RunData
from paceline.controller.observe.report.markup import Markup, tag
from paceline.controller.observe.view.state import sequential_time, shares
from paceline.controller.observe.view.text import number, reward_mark

MAX_EXAMPLE_CHARACTERS = 4000


def curves(title: str, charts: Sequence[Chart], *extra: Markup) -> Markup | None:
    """A section of charts; nothing where there are none."""
    if not charts and not any(extra):
        return None
    return tag("section", tag("h2", title), tag("div", extra, map(_figure, charts), class_="grid"))


def time_shares(data: RunData) -> Markup:
    """Where the run's training time went in all, as one bar."""
    train = data.phase("train")
    parts = shares(sequential_time(train))
    if not parts:
        return Markup()
    beside = []
    for name, words in (("generate", "generation"), ("sync", "weight sync")):
        values = [value for record in train if (value := record.time.get(name)) is not None]
        if values:
            beside.append(f"{words} {number(sum(values) / len(values), '.2f')} s")
    caption = "Share of the training steps' wall time, over the whole run."
    if beside:
        caption += f" Beside these, a step on average: {', '.join(beside)}."
    colors = [f"c{index % 7 + 1}" for index in range(len(parts))]
    bar = [
        tag("span", class_=color, style=f"width:{100 * share:.2f}%", title=f"{name} {share:.1%}")
        for color, (name, share) in zip(colors, parts.items(), strict=True)
    ]
    names = [f"{name.replace('_', ' ')} {share:.1%}" for name, share in parts.items()]
    return tag(
        "figure",
        tag("h3", "Where the time goes"),
        tag("figcaption", caption),
        tag("div", bar, class_="bar"),
        _legend(list(zip(colors, names, strict=True))),
        class_="card wide",
    )


def examples(data: RunData) -> Markup | None:
    """Held-out prompts with the greedy answers before and after."""
    if not data.examples:
        return None
    head = tag("tr", [tag("th", name) for name in ("Prompt", "Reference", "Before", "After")])
    return tag(
        "section",
        tag("h2", "Held-out examples"),
        tag(
            "div",
            tag("table", tag("thead", head), tag("tbody", map(_example, data.examples))),
            class_="card scroll",
        ),
    )


def notes(data: RunData) -> Markup:
    """What the numbers do and do not show."""
    lines = [tag("li", line) for line in _notes(data)]
    return tag(
        "section", tag("h2", "How to read this"), tag("div", tag("ul", lines), class_="card")
    )


def reproduction(data: RunData) -> Markup:
    """Command, seeds, versions and configuration."""
    command = data.summary.command or str(data.versions.get("command", ""))
    how = [
        tag("p", "Run this where the same versions are installed; choose a new name or folder."),
        tag("pre", command, class_="command") if command else None,
        tag(
            "p",
            "The resolved configuration, defaults filled in, is in ",
            tag("code", "config.yaml"),
            " beside this file. Rollouts arrive in an order that depends on the machine, so two "
            "runs with one seed agree in their curves, not in every digit.",
            style="margin-top:10px",
        ),
    ]
    facts = [item for name, value in _facts(data) for item in (tag("dt", name), tag("dd", value))]
    config = tag(
        "details", tag("summary", "Configuration"), tag("pre", data.config_text), class_="card wide"
    )
    return tag(
        "section",
        tag("h2", "How to reproduce it"),
        tag(
            "div",
            tag("div", how, class_="card half"),
            tag("div", tag("dl", facts), class_="card half"),
            config if data.config_text else None,
            class_="grid",
        ),
    )


def _figure(chart: Chart) -> Markup:
    width = {HALF.width: "half", THIRD.width: "third"}.get(chart.size.width, "wide")
    return tag(
        "figure",
        tag("h3", chart.title),
        tag("figcaption", chart.caption),
        _legend([(one.color, one.name) for one in chart.series]) if len(chart.series) > 1 else None,
        chart.svg(),
        class_=f"card {width}",
    )


def _legend(entries: Sequence[tuple[str, str]]) -> Markup:
    items = [tag("span", tag("i", class_=color), name) for color, name in entries]
    return tag("div", items, class_="legend")


def _example(example: ExampleRecord) -> Markup:
    return tag(
        "tr",
        tag("td", _text(example.prompt)),
        tag("td", _text("" if example.reference is None else example.reference)),
        tag("td", _generation(example.before)),
        tag("td", _generation(example.after)),
    )


def _generation(generation: Generation | None) -> Markup:
    if generation is None:
        return tag("span", "not generated", class_="muted")
    mark = reward_mark(generation.reward)
    style = {"✓": "good", "✗": "bad"}.get(mark, "warn")
    words = f"reward {number(generation.reward)}"
    sign = tag("span", mark, class_=f"mark {style}", title=words, role="img", aria_label=words)
    return tag("div", sign, _text(generation.text), class_="row")


def _text(text: str) -> Markup:
    """A prompt or completion as it was, cut where it is very long."""
    rest = len(text) - MAX_EXAMPLE_CHARACTERS
    if rest > 0:
        text = f"{text[:MAX_EXAMPLE_CHARACTERS]}… ({rest} more characters)"
    return tag("span", text, class_="text")


def _notes(data: RunData) -> Iterable[str]:
    summary = data.summary
    if not data.has_summary:
        yield (
            "This run left no summary: it is still at work, or it was killed. The figures are what "
            "its metrics hold so far."
        )
    elif summary.status == "interrupted":
        yield "The run was interrupted: the curves end before the planned number of steps."
    last = data.evaluations[-1] if data.evaluations else None
    if last is not None and last.label == "during":
        yield f"The accuracy after training is the one of the last evaluation, at step {last.step}."
    if summary.num_held_out:
        yield (
            f"Accuracy is measured on {summary.num_held_out} held-out prompts that no "
            f"training saw. A difference of less than about two standard errors is no evidence."
        )
    yield (
        "This is one run with one seed. Other seeds end elsewhere; compare methods over several."
    )
    if data.phase("warm_start"):
        yield (
            "The warm start imitates gold answers. “Before” is measured after it, so that the gain "
            "is reinforcement learning's alone."
        )
    yield from _drop_notes(data)
    yield from _file_notes(data)


def _drop_notes(data: RunData) -> Iterable[str]:
    dropped = data.summary.groups.get("dropped") or {}
    reasons = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in dropped.items())
    if reasons:
        yield f"Groups generated but not trained on, by reason: {reasons}."
    if data.summary.max_age is not None and data.summary.max_age > data.summary.max_lag:
        yield (
            f"A trained token was {data.summary.max_age} weight versions old, more than the "
            f"{data.summary.max_lag} allowed: this is a defect, please report it."
        )


def _file_notes(data: RunData) -> Iterable[str]:
    if data.num_discarded:
        yield (
            f"{data.num_discarded} recorded steps and evaluations lay after the checkpoint that "
            f"the run was resumed from: they were done again, and only the repetition is shown."
        )
    resumed = data.versions.get("resumed_with")
    if resumed:
        yield f"The run was resumed {len(resumed)} times; versions.json lists when, and with what."
    if data.num_unreadable:
        yield f"{data.num_unreadable} lines of metrics.jsonl could not be read and were left out."


def _facts(data: RunData) -> list[tuple[str, str]]:
    versions, cpu = data.versions, data.versions.get("cpu") or {}
    git, packages = versions.get("git") or {}, versions.get("packages") or {}
    seeds = ", ".join(f"{name} {value}" for name, value in data.summary.seeds.items())
    commit = str(git.get("commit", "")) + (", with local changes" if git.get("modified") else "")
    facts = [
        ("seeds", seeds),
        ("commit", commit),
        (
            "machine",
            f"{cpu.get('usable', '?')} of {cpu.get('count', '?')} CPUs, {cpu.get('model')}",
        ),
        ("platform", str(versions.get("platform", ""))),
        ("python", str(versions.get("python", ""))),
        *((str(name), str(version)) for name, version in packages.items()),
    ]
    return [(name, value) for name, value in facts if value and (name != "machine" or cpu)]
