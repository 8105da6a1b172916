"""``report.html``: one self-contained page about a run, made from the files in its folder alone."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import write_atomically
from paceline.controller.observe.report.curves import (
    learner_charts,
    learning_charts,
    machine_charts,
)
from paceline.controller.observe.report.data import RunData
from paceline.controller.observe.report.headline import heading, headline
from paceline.controller.observe.report.markup import Markup, tag
from paceline.controller.observe.report.sections import (
    curves,
    examples,
    notes,
    reproduction,
    time_shares,
)
from paceline.controller.observe.report.stylesheet import SCRIPT, STYLE


def write_report(folder: RunFolder) -> Path:
    """Write the report of a run, finished or not; returns its path.

    Works with whatever the run has written so far, and may be called again at any time.
    """
    write_atomically(folder.report, render_report(RunData.read(folder)))
    return folder.report


def render_report(data: RunData) -> str:
    """The page. It needs no network, no scripts for reading, and admits no script but its own."""
    body = tag(
        "main",
        heading(data),
        headline(data),
        curves("What it learned", learning_charts(data)),
        examples(data),
        curves("How it ran", machine_charts(data), time_shares(data)),
        curves("Inside the learner", learner_charts(data)),
        notes(data),
        reproduction(data),
        tag("footer", "Written by Paceline from the files in this folder."),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Samples are escaped; should one ever slip through, the browser still runs nothing of it.
        tag("meta", http_equiv="Content-Security-Policy", content=_policy()),
        tag("title", f"{data.name} · Paceline"),
        tag("style", Markup(STYLE)),
    )
    page = tag(
        "html",
        head,
        tag("body", body, tag("div", id="tip"), tag("script", Markup(SCRIPT))),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _policy() -> str:
    """Nothing is loaded, and the only script is the one with this digest."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
