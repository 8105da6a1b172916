"""``report.html``: one self-contained page about a run, made from the files in its folder alone."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import write_atomically
from paceline.controller.observe.files.summary import STATUS_WORDS
from paceline.controller.observe.report.charts import color_of
from paceline.controller.observe.report.curves import (
    learner_charts,
    learning_charts,
    machine_charts,
)
from paceline.controller.observe.report.data import RunData
from paceline.controller.observe.report.vega_lite import svg, vega_lite
from paceline.controller.observe.view.state import sequential_time, shares
from paceline.controller.observe.view.text import (
    count,
    duration,
    number,
    percent,
    printable,
    reward_mark,
)

TEMPLATES = Path(__file__).parent
MAX_EXAMPLE_CHARACTERS = 4000


def write_report(folder: RunFolder) -> Path:
    """Write the report of a run, finished or not; return its path.

    Works with whatever the run has written so far, and may be called again at any time.
    """
    write_atomically(folder.report, render_report(RunData.read(folder)))
    return folder.report


def render_report(data: RunData) -> str:
    """Return the page. It loads nothing, needs no script for reading, and runs none but its own."""
    import jinja2  # late, like the charts' library: only a run's end needs them

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.ChainableUndefined,  # any part of a foreign file may be missing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (count, duration, number, percent, reward_mark, excerpt)
    environment.filters.update({each.__name__: each for each in formats})
    style, script = (
        read_template("theme.css") + read_template("report.css"),
        read_template("report.js"),
    )
    return environment.get_template("report.html.j2").render(
        run=data,
        warm=data.phase("warm_start"),
        train=data.phase("train"),
        shares=shares(sequential_time(data.phase("train"))),
        learning=learning_charts(data),
        machine=machine_charts(data),
        learner=learner_charts(data),
        svg=svg,
        vega_lite=vega_lite,
        color_of=color_of,
        status_words=STATUS_WORDS,
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}",
    )


def read_template(name: str) -> str:
    """Return the text of a file beside this module."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def excerpt(text: str) -> str:
    """Return a prompt or completion as it was, cut where it is very long."""
    rest = len(text) - MAX_EXAMPLE_CHARACTERS
    return f"{text[:MAX_EXAMPLE_CHARACTERS]}… ({rest} more characters)" if rest > 0 else text


def _finalize(value: Any) -> Any:
    """Return what the template shows of a value: control characters are spelled out."""
    if value is None:
        return ""
    return printable(value) if type(value) is str else value


def _digest(text: str) -> str:
    """Return the source expression that admits exactly this inline element."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
