"""Text of unknown origin, and numbers that may be missing, made fit to be shown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"

UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, without newline and tab
    "\u2028-\u202e\u2066-\u2069"  # line separators and what reverses the reading direction
    "\ud800-\udfff]"  # halves of surrogate pairs
)


def printable(text: str) -> str:
    r"""Return the text with control characters and lone surrogates spelled out, but ``\n``, ``\t``.

    Completions are whatever a model sampled: escape sequences must not reach a terminal, nor
    code points that no encoding can carry a file.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def fit_line(text: str, width: int) -> str:
    """Return the text on one line of at most ``width`` characters, an ellipsis where it was cut."""
    line = printable(text).replace("\n", "⏎").replace("\t", " ")
    return line if len(line) <= width else line[: max(0, width - 1)] + "…"


def is_number(value: float | None) -> bool:
    """Return whether the value was measured and is finite."""
    return value is not None and math.isfinite(value)


def number(value: float | None, format_spec: str = ".3g", missing: str = "-") -> str:
    """Return the value in a format; ``missing`` where there is none, ``nan`` where not finite."""
    if value is None:
        return missing
    return format(value, format_spec) if math.isfinite(value) else str(value)


def percent(value: float | None, missing: str = "-") -> str:
    """Return a fraction as per cent with one decimal: ``0.9453`` is ``94.5%``."""
    return number(value, ".1%", missing)


def reward_mark(reward: float | None) -> str:
    """Return ``✓`` for a reward of 1, ``✗`` for 0, the number for any other."""
    marks = {1.0: "✓", 0.0: "✗"}
    return marks[reward] if reward in marks else number(reward, ".2f", "?")


def count(value: float | None, missing: str = "-") -> str:
    """Return a count in at most four characters and a unit: ``1234567`` is ``1.23M``."""
    if value is None or not math.isfinite(value):
        return number(value, missing=missing)
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}" if value % 1 else f"{value:.0f}"


def duration(seconds: float | None, missing: str = "-") -> str:
    """Return seconds for people: ``7.5s``, ``3m 12s``, ``2h 05m``."""
    if seconds is None or not math.isfinite(seconds):
        return missing
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def buckets(values: Sequence[float], num_buckets: int) -> list[float]:
    """Return means of at most ``num_buckets`` runs of neighbouring values, in order."""
    num_buckets = min(num_buckets, len(values))
    edges = [len(values) * i // num_buckets for i in range(num_buckets + 1)] if values else [0]
    return [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Return a curve in block characters; 0 to 1 where the values lie there, else their range."""
    points = buckets([v for v in values if v is not None and math.isfinite(v)], width)
    if not points:
        return ""
    low, high = min(0.0, *points), max(1.0, *points)
    if high > 1.0 or low < 0.0:
        low, high = min(points), max(points)
    scale = (len(BARS) - 1) / ((high - low) or 1.0)
    return "".join(BARS[round((point - low) * scale)] for point in points)
