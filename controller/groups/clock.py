"""Where the time of a step goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator


class StepClock:
    """Adds up seconds by name; spans of different tasks overlap, so they need not sum to a step."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def read_and_reset(self) -> dict[str, float]:
        """Return seconds by name since the last call."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
