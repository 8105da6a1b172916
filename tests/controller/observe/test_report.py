"""The report: one file that loads nothing, admits no foreign script, and needs no whole run.

What a browser makes of it is in ``test_report_in_browser.py``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from rich.console import Console

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import JsonLines, write_json_lines
from paceline.controller.observe.files.records import (
    EvaluationRecord,
    ExampleRecord,
    Generation,
    StepRecord,
)
from paceline.controller.observe.files.summary import RunSummary, print_summary
from paceline.controller.observe.report.curves import learner_charts, machine_charts
from paceline.controller.observe.report.data import RunData
from paceline.controller.observe.report.report import read_template, write_report

WriteRun = Callable[..., RunFolder]
NEVER_CLOSED = frozenset({"meta"})
ATTACK = "</td></script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload=alert(3) &"


class Page(HTMLParser):
    """What a browser would make of a page: elements with attributes, scripts and plain text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in NEVER_CLOSED:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in self.inline:
            self.inline[self._open[-1]].append(data)
        else:
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [value for _, found in self.elements if (value := found.get(name)) is not None]


def report_of(folder: RunFolder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_report_shows_the_run(synthetic_run: WriteRun) -> None:
    page = report_of(synthetic_run())
    for expected in (
        "spell-backward", "finished", "39.8%", "92.6%", "+52.7 points", "256 prompts", "3m 24s",
        "Held-out accuracy", "Reward in training", "Completion length", "Policy age", "bound 1",
        "Tokens per second", "Where the time goes", "Dropped groups", "Entropy", "Clipped tokens",
        "warm start", "ammonia=", "ainomma", "paceline train quickstart.yaml", "2.13.0+cpu",
        "task: spell_backward", "3,762 zero signal",
    ):  # fmt: skip
        assert expected in page.text, expected


def test_a_report_loads_nothing(synthetic_run: WriteRun) -> None:
    html = write_report(synthetic_run()).read_text(encoding="utf-8")
    named = re.sub(r'xmlns(:xlink)?="http://www.w3.org/[^"]*"', "", html)  # read, never loaded
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bimport\b.*\bfrom\b", named)
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {e for e, _ in page.elements}
    for name in ("src", "href", "srcset", "xlink:href", "action"):
        assert not page.attributes(name)


def test_what_a_model_or_a_user_wrote_is_text_and_never_markup(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config(
        f"name: {json.dumps(ATTACK)}\ndata: {{source: {{task: {json.dumps(ATTACK)}}}}}\n"
    )
    folder.write_versions({"command": ATTACK, "seed": 1, "packages": {ATTACK: ATTACK}})
    generation = Generation(ATTACK, 1.0)
    folder.write_examples([ExampleRecord(ATTACK, ATTACK, generation, generation)])
    hostile = dict.fromkeys([ATTACK], 0.5)
    records = [
        StepRecord("train", step, 1.0, 0.5, metrics=hostile, time=hostile, dropped=hostile,
                   buffer=hostile)
        for step in (1, 2, 3)
    ]  # fmt: skip
    write_json_lines(folder.metrics, [record.as_dict() for record in records])
    RunSummary(ATTACK, "failed", {ATTACK: 1}, 3, 8, 1, error=ATTACK).write(folder)  # type: ignore[arg-type]
    page = report_of(folder)
    assert page.inline["script"] == [read_template("report.js")]
    assert "img" not in {element for element, _ in page.elements}
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 8


def test_only_the_reports_own_script_and_style_are_admitted(synthetic_run: WriteRun) -> None:
    page = report_of(synthetic_run())
    policy = next(f["content"] for _, f in page.elements if f.get("http-equiv"))
    digests = {
        kind: base64.b64encode(hashlib.sha256("".join(texts).encode()).digest()).decode()
        for kind, texts in page.inline.items()
    }
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digests['style']}'; "
        f"script-src 'sha256-{digests['script']}'"
    )
    assert not page.attributes("style")


def test_a_run_that_was_killed_has_a_report(synthetic_run: WriteRun) -> None:
    page = report_of(synthetic_run(train_steps=90, finished=False))
    for expected in ("unfinished", "left no summary", "at step 80", "39.8%", "not generated"):
        assert expected in page.text, expected


def test_a_run_without_a_warm_start_shows_none(synthetic_run: WriteRun) -> None:
    assert "warm start" not in report_of(synthetic_run(warm_steps=0)).text.partition("Configur")[0]


def test_a_run_that_ended_in_its_warm_start_has_a_report(synthetic_run: WriteRun) -> None:
    page = report_of(synthetic_run(train_steps=0, finished=False))
    assert "Warm-start loss" in page.text
    assert "Policy age" not in page.text


def test_a_run_that_recorded_nothing_has_a_report(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config("name: run\n")
    assert "not measured" in report_of(RunFolder.open(folder.root)).text


def test_unreadable_files_cost_their_own_part_only(synthetic_run: WriteRun) -> None:
    folder = synthetic_run()
    folder.config.write_text("name: [unclosed")
    for path in (folder.summary, folder.versions, folder.examples):
        path.write_text('{"torn": ')
    with folder.metrics.open("a") as file:
        file.write('{"phase": "train", "st')
    page = report_of(folder)
    assert "1 lines of metrics.jsonl could not be read" in page.text
    assert "92.6%" in page.text


def test_numbers_that_are_missing_or_not_finite_leave_a_gap(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config("name: run\n")
    with JsonLines(folder.metrics) as lines:
        for step in range(1, 6):
            bad = math.nan if step % 2 else None
            record = StepRecord(
                "train", step, 1.0, reward=bad, age_max=bad, loss=0.5 if step == 3 else math.inf,
                metrics={"kl": bad}, time={"train": bad}, dropped={"zero_signal": bad},
            )  # fmt: skip
            lines.append(record.as_dict())
        unknown = EvaluationRecord("before", 0, 0.1, math.nan, None, 0, math.nan)
        lines.append(unknown.as_dict())
    html = write_report(folder).read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b|\binf\b", Page(html).text.lower())
    assert "Policy loss" in html
    assert "Reward in training" not in html


def test_zero_is_a_value_and_a_reason_that_a_step_lacks_is_zero(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with JsonLines(folder.metrics) as lines:
        for step, dropped in ((1, {"zero_signal": 3}), (2, {"grader_error": 1})):
            record = StepRecord("train", step, 1.0, metrics={"kl": 0.0}, dropped=dropped)
            lines.append(record.as_dict())
    data = RunData.read(folder)
    (kl,) = learner_charts(data)
    assert [point.value for point in kl.series[0].points] == [0.0, 0.0]
    dropped = next(chart for chart in machine_charts(data) if chart.title == "Dropped groups")
    values = {one.name: [point.value for point in one.points] for one in dropped.series}
    assert values == {"zero signal": [3, 0], "grader error": [0, 1]}


def test_text_that_utf8_cannot_carry_is_spelled_out(synthetic_run: WriteRun) -> None:
    folder = synthetic_run()
    odd = Generation("half \ud800 and bell \x07 and turned \u202e", 0.0)
    folder.write_examples([ExampleRecord("p", None, odd, odd)])
    text = report_of(folder).text
    assert "half \\ud800 and bell \\x07 and turned \\u202e" in text


def test_long_runs_and_long_completions_stay_small(synthetic_run: WriteRun) -> None:
    folder = synthetic_run(train_steps=5000)
    long = Generation("word " * 20_000, 1.0)
    folder.write_examples([ExampleRecord("p", None, long, long)])
    html = write_report(folder).read_text(encoding="utf-8")
    assert len(html) < 1_500_000
    assert "more characters" in html


def test_a_step_that_was_done_again_is_shown_once(synthetic_run: WriteRun) -> None:
    folder = synthetic_run(train_steps=20, finished=False)
    with JsonLines(folder.metrics) as lines:
        lines.append(StepRecord("train", 20, 99.0, reward=0.987).as_dict())
    train = RunData.read(folder).phase("train")
    assert [record.step for record in train] == list(range(1, 21))
    assert train[-1].reward == 0.987


def test_validation_prompts_are_never_counted_as_held_out(synthetic_run: WriteRun) -> None:
    folder = synthetic_run(train_steps=20, finished=False)
    with JsonLines(folder.metrics) as lines:
        lines.append(EvaluationRecord.measured("validation", 0, 9.0, 0.123, None, 5000).as_dict())
    text = report_of(folder).text
    assert "39.8%" in text
    assert "12.3%" not in text
    assert "5000 prompts" not in text


def test_a_broken_freshness_bound_is_said_aloud(synthetic_run: WriteRun) -> None:
    folder = synthetic_run()
    summary = RunSummary.read(folder)
    assert summary is not None
    replace(summary, max_age=3).write(folder)
    assert "more than the 1 allowed: this is a defect" in report_of(folder).text


def test_libraries_are_imported_when_a_report_is_written_and_not_before() -> None:
    code = (
        "import sys, paceline.controller.cli, paceline.controller.observe.report.report, "
        "paceline.controller.observe.report.comparison\n"
        "print(sys.modules.keys() & {'jinja2', 'vl_convert'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_summary_reads_back_what_it_wrote(synthetic_run: WriteRun) -> None:
    folder = synthetic_run()
    summary = RunSummary.read(folder)
    assert summary is not None
    replace(summary, greedy_after=math.nan).write(folder)
    assert RunSummary.read(folder) == replace(summary, greedy_after=None)


def test_the_last_line_of_a_run_says_where_its_report_is(synthetic_run: WriteRun) -> None:
    folder = synthetic_run()
    summary = RunSummary.read(folder)
    assert summary is not None
    console = Console(file=io.StringIO(), width=40)
    with console.capture() as capture:
        print_summary(summary, folder.report, console)
    lines = capture.get().splitlines()
    assert lines[-1].endswith(str(folder.report))
    assert "39.8%" in capture.get()


def test_a_failed_run_says_why_in_one_line() -> None:
    summary = RunSummary("demo", "failed", {}, 3, 256, 1, error="worker died\n[red]twice[/]")
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        print_summary(summary, None, console)
    assert "failed: worker died⏎[red]twice[/]" in capture.get()
