"""Whether to draft at all: off where the predicted gain is below a margin (pure).

A prediction errs, and both sides of it go stale: no draft is verified while drafting is off, no
plain step is timed while it is on. So every so often one round is a *probe*, which does the other
thing. Probes that change nothing become rarer, until 1 in ``LONGEST_INTERVAL`` rounds: what does
not pay costs less than a hundredth from then on, if a probe takes less than three and a half steps.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_INTERVAL = 8
LONGEST_INTERVAL = 256
INTERVAL_AFTER_UPDATE = 32
LOOK_SHARE = 0.005
FIRST_CREDIT = 0.02
"""Seconds of looking that an engine begins with, and can save up."""


@dataclass(frozen=True)
class Decision:
    """Whether this round drafts, and whether only to learn what drafting would do."""

    draft: bool
    probe: bool


@dataclass
class DraftSwitch:
    """On above a gain of 1 + ``margin`` + ``hysteresis``, off below 1 + ``margin``; starts off.

    The margin is for what the model leaves out, the hysteresis keeps noise from toggling it.
    """

    margin: float = 0.02
    hysteresis: float = 0.02
    is_on: bool = False
    _interval: int = FIRST_INTERVAL
    _rounds: int = 0

    def decide(self, gain: float) -> Decision:
        """For one round; ``gain`` is the predicted speed with drafts over the speed without, 0 if
        nothing is known."""
        bound = 1 + self.margin + (0.0 if self.is_on else self.hysteresis)
        if (gain >= bound) != self.is_on:
            self.is_on = not self.is_on
            self._interval, self._rounds = FIRST_INTERVAL, 0
        self._rounds += 1
        if self._rounds < self._interval:
            return Decision(self.is_on, probe=False)
        self._interval, self._rounds = min(2 * self._interval, LONGEST_INTERVAL), 0
        return Decision(not self.is_on, probe=True)

    def weights_changed(self) -> None:
        """What was tried is out of date: probe soon, but not as if nothing were known."""
        self._interval = min(self._interval, INTERVAL_AFTER_UPDATE)


@dataclass
class LookBudget:
    """Asking the drafter although drafting is off may cost ``LOOK_SHARE`` of the time."""

    _credit: float = FIRST_CREDIT

    @property
    def are_due(self) -> bool:
        """Whether there is time for it."""
        return self._credit >= 0

    def spend(self, step_seconds: float, look_seconds: float) -> None:
        """A step took so long, of which asking took ``look_seconds``, 0 if nobody asked."""
        self._credit += LOOK_SHARE * step_seconds - look_seconds
        self._credit = min(self._credit, FIRST_CREDIT)
