"""The report in a real Chromium: curves are there, model text is text, nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import write_json_lines
from paceline.controller.observe.files.records import ExampleRecord, Generation, StepRecord
from paceline.controller.observe.files.summary import RunSummary
from paceline.controller.observe.report.report import write_report
from tests.controller.observe.browser import Tab, chromium

WriteRun = Callable[..., RunFolder]
NUM_CHARTS = 17
"""Charts of the synthetic run: five of learning, five of the machines, seven of the learner."""
HOSTILE = (
    "</span></td></script></style></svg><script>window.hacked = 1</script>"
    "<img src=x onerror='window.hacked = 1'><svg onload='window.hacked = 1'>"
    "<a href='javascript:window.hacked = 1'>a</a>' onmouseover='window.hacked = 1' "
    '" onfocus="window.hacked = 1" autofocus {{ 7 * 7 }} \x00\x07\x1b[2J \u202eturned\u2066 \ud800'
)
SIZES_OF_MARKS = """
[...document.querySelectorAll('[data-readout]')].map(chart =>
  [...chart.querySelectorAll('.mark-line path, .mark-area path, .mark-symbol path')]
    .map(mark => mark.getBoundingClientRect())
    .filter(box => box.width > 0 && box.height > 0).length)
"""


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    """A browser for one test."""
    with chromium(tmp_path / "profile") as tab:
        yield tab


def test_curves_are_drawn_without_a_complaint_or_a_request(
    synthetic_run: WriteRun, tab: Tab
) -> None:
    page = write_report(synthetic_run())
    tab.open(page)
    marks = tab.value(SIZES_OF_MARKS)
    assert len(marks) == NUM_CHARTS
    assert all(count >= 1 for count in marks), marks
    assert marks[0] > 20, "a dot for every evaluation"
    assert tab.complaints() == []
    assert tab.requested() == [page.as_uri()]


def test_the_pointer_shows_the_values_of_the_nearest_step(
    synthetic_run: WriteRun, tab: Tab
) -> None:
    tab.open(write_report(synthetic_run()))
    tab.value("document.querySelector('[data-readout]').scrollIntoView()")
    box = tab.value(
        "JSON.parse(JSON.stringify(document.querySelector('[data-readout] .background')"
        ".getBoundingClientRect()))"
    )
    tab.move_pointer(box["left"] + 0.61 * box["width"], box["top"] + 20)
    shown = tab.value("document.getElementById('tip').innerText.split('\\n')")
    assert shown[0] == "step 120"
    assert shown[1].startswith("greedy 8") and "±" in shown[1]
    assert tab.value("getComputedStyle(document.getElementById('tip')).visibility") == "visible"
    tab.move_pointer(1, 1)
    assert tab.value("getComputedStyle(document.getElementById('tip')).visibility") == "hidden"
    assert tab.complaints() == []


def hostile_run(root: Path) -> RunFolder:
    """A run in which every text is hostile, a line of one million characters among them."""
    folder = RunFolder.create(root)
    folder.write_config("name: run\n# " + HOSTILE.encode("utf-8", "replace").decode())
    folder.write_versions({"command": HOSTILE, "packages": {HOSTILE: HOSTILE}})
    short, long = Generation(HOSTILE, 1.0), Generation(HOSTILE + "A" * 1_000_000, 0.0)
    folder.write_examples([ExampleRecord(HOSTILE, HOSTILE, short, long)])
    named = {HOSTILE: 0.5, f"{HOSTILE}2": 0.5}
    records = [
        StepRecord("train", step, 1.0, 0.5, metrics=named, time=named, dropped=named, buffer=named)
        for step in range(1, 6)
    ]
    write_json_lines(folder.metrics, [record.as_dict() for record in records])
    RunSummary(HOSTILE, "failed", {HOSTILE: 1}, 3, 8, 1, error=HOSTILE).write(folder)  # type: ignore[arg-type]
    return folder


def test_what_a_model_wrote_is_shown_as_text_and_never_runs(tmp_path: Path, tab: Tab) -> None:
    page = write_report(hostile_run(tmp_path / "run"))
    tab.open(page)
    tab.value("for (const e of document.querySelectorAll('*')) { e.focus?.(); e.click?.(); }")
    assert tab.value("window.hacked") is None
    shown = tab.value("[...document.querySelectorAll('.text')].map(e => e.innerText)")
    as_text = HOSTILE.replace("\x00\x07\x1b[2J \u202eturned\u2066 \ud800", "")
    assert all(text.startswith(as_text) for text in shown)
    assert len(shown) == 4
    assert "\\x00\\x07\\x1b[2J \\u202eturned\\u2066 \\ud800" in shown[0]
    assert "more characters" in shown[-1]
    assert tab.value("document.querySelectorAll('img, a, script, [onload], [onfocus]').length") == 1
    assert len(tab.value("document.body.innerText")) < 50_000
    assert tab.value("document.documentElement.scrollWidth <= innerWidth"), "long words are broken"
    assert page.stat().st_size < 1_000_000
    assert tab.complaints() == []
    assert tab.requested() == [page.as_uri()]


def test_markup_that_slipped_in_would_neither_run_nor_load(
    synthetic_run: WriteRun, tab: Tab
) -> None:
    page = write_report(synthetic_run())
    pixel = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw=="
    slipped = f"<script>window.hacked = 1</script><img src='{pixel}' onload='window.hacked = 1'>"
    page.write_text(page.read_text().replace("<footer>", f"{slipped}<footer>"))
    tab.open(page)
    assert tab.value("window.hacked") is None
    assert tab.value("document.querySelector('img').naturalWidth") == 0
    assert len(tab.complaints()) >= 2, "the policy's refusals are told"


def test_colours_follow_the_theme_and_a_narrow_window_needs_no_sideways_scrolling(
    synthetic_run: WriteRun, tab: Tab
) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    tab.call("Emulation.setDeviceMetricsOverride", **size)
    tab.open(write_report(synthetic_run()))
    assert tab.value("document.documentElement.scrollWidth") <= 390
    stroke = "getComputedStyle(document.querySelector('.mark-line path')).stroke"
    light = tab.value(stroke)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    tab.call("Emulation.setEmulatedMedia", features=dark)
    assert light.startswith("rgb") and tab.value(stroke).startswith("rgb")
    assert tab.value(stroke) != light


def test_a_page_of_five_thousand_steps_is_small(synthetic_run: WriteRun, tab: Tab) -> None:
    page = write_report(synthetic_run(train_steps=5000))
    assert page.stat().st_size < 1_500_000
    tab.open(page)
    assert tab.value("document.querySelectorAll('*').length") < 5000
    assert tab.complaints() == []
