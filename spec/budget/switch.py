"""Switch of drafting: off where the predicted gain is below a margin (pure).

A prediction errs, and both sides of it go stale: no draft is verified while drafting is off, no
plain step is timed while it is on. So now and then one round is a *probe*, which does the opposite.
Probes that change nothing become rarer, down to 1 in ``LONGEST_INTERVAL`` rounds. From then on they
cost less than a hundredth of the time, if a probe takes less than three and a half steps.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_INTERVAL = 8
LONGEST_INTERVAL = 256
INTERVAL_AFTER_UPDATE = 32
PROPOSAL_SHARE = 0.005
FIRST_CREDIT = 0.02
"""Seconds of calls to the drafter that an engine begins with, and can save up at most."""


@dataclass(frozen=True)
class Decision:
    """Decision for a round: to ``draft`` or not, and whether that is a ``probe``."""

    draft: bool
    probe: bool


@dataclass
class DraftSwitch:
    """Switch, off at first: on above 1 + ``margin`` + ``hysteresis``, off below 1 + ``margin``.

    Both are bounds of the gain. The margin covers what the model leaves out; the hysteresis keeps
    noise from toggling the switch.
    """

    margin: float = 0.02
    hysteresis: float = 0.02
    is_on: bool = False
    _interval: int = FIRST_INTERVAL
    _rounds: int = 0

    def decide(self, gain: float) -> Decision:
        """Decide for one round; ``gain`` is the predicted speed with drafts over that without, 0 if
        unknown."""
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
        """Probe soon, since earlier probes are out of date, though not as often as at first."""
        self._interval = min(self._interval, INTERVAL_AFTER_UPDATE)


@dataclass
class ProposalBudget:
    """Budget of calls to the drafter while drafting is off: ``PROPOSAL_SHARE`` of the time."""

    _credit: float = FIRST_CREDIT

    @property
    def are_due(self) -> bool:
        """True while there is time left for them."""
        return self._credit >= 0

    def spend(self, step_seconds: float, proposal_seconds: float) -> None:
        """Account for a step of which the drafter took ``proposal_seconds``, 0 if not called."""
        self._credit += PROPOSAL_SHARE * step_seconds - proposal_seconds
        self._credit = min(self._credit, FIRST_CREDIT)
