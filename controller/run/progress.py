"""What is known of a run so far, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from paceline.controller.run.metering import RunTotals


@dataclass
class RunProgress:
    """Filled as the run goes, so that a summary can be made whenever it ends; part of it travels
    in checkpoints.

    ``step`` counts finished training steps; ``seconds`` is wall time by part of the run, from the
    ``startup`` that it begins in; ``before`` and ``after`` are what held-out evaluations found.
    """

    totals: RunTotals = field(default_factory=RunTotals)
    seconds: dict[str, float] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    warm_start: dict[str, float] | None = None
    step: int = 0
    solved: bool = False
    _part: str = "startup"
    _since: float = field(default_factory=time.perf_counter)

    def enter(self, part: str) -> None:
        """Count time for a part of the run from now on."""
        self.settle()
        self._part = part

    @contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Count the block's time for a part; blocks within it count for theirs alone."""
        outer = self._part
        self.enter(part)
        try:
            yield
        finally:
            self.enter(outer)

    def settle(self) -> None:
        """Bring ``seconds`` up to now."""
        now = time.perf_counter()
        self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._since = now

    @property
    def began(self) -> float:
        """The time at which an uninterrupted run would have begun, by ``time.perf_counter``."""
        self.settle()
        return self._since - sum(self.seconds.values())
