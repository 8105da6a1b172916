"""How much work to have in flight: as little as keeps the learner busy (pure).

The freshness budget says how much *may* be in flight. Where rollouts are faster than the learner,
using all of it makes every sample as old as is allowed, and wins nothing: finished groups merely
wait. Where they are slower, all of it is needed. So the limit follows what was measured:

- the learner waited for a batch: a quarter step's groups more;
- in each of the last steps more than half a step's groups lay finished when the learner took its
  batch: half of what was never needed less.

It never falls below two steps' groups, one in training and one in the making, nor rises above the
budget. Nothing is ever discarded for its age: what would be too old is not begun.

Example, P = 8, S = 4 (40 slots), the learner the slower: 24, 21 and 22 groups lay finished in three
steps, at least 21; 21 - 4 were never needed, and the limit falls by half of that:

>>> from paceline.controller.groups.freshness import freshness_budget
>>> pacer = Pacer(freshness_budget(groups_per_step=8, max_lag=4))
>>> [pacer.observe(Flow(waited=0.0, elapsed=9.0, surplus=left)) for left in (24, 21, 22)]
[40, 40, 31]
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from paceline.controller.groups.freshness import FreshnessBudget

WAIT_SHARE = 0.02
"""Share of a step that the learner may wait before more work is let in."""
PATIENCE = 3
"""Steps that must agree that there is too much."""


@dataclass(frozen=True)
class Flow:
    """Measurements of one step: seconds waited for its batch, seconds since the batch before, and
    how many finished groups were left over, anywhere, when it took its own."""

    waited: float
    elapsed: float
    surplus: int


@dataclass
class Pacer:
    """The limit on slots, adapted step by step."""

    budget: FreshnessBudget
    limit: int = field(init=False)

    def __post_init__(self) -> None:
        self.limit = self.budget.capacity
        self._surplus: deque[int] = deque(maxlen=PATIENCE)

    def observe(self, flow: Flow) -> int:
        """Return the limit from now on."""
        groups = self.budget.groups_per_step
        if flow.waited > WAIT_SHARE * flow.elapsed:
            self._surplus.clear()
            return self._set(self.limit + math.ceil(groups / 4))
        self._surplus.append(flow.surplus)
        unneeded = min(self._surplus) - groups // 2
        if len(self._surplus) < PATIENCE or unneeded <= 0:
            return self.limit
        self._surplus.clear()
        return self._set(self.limit - math.ceil(unneeded / 2))

    def _set(self, limit: int) -> int:
        lowest = min(2 * self.budget.groups_per_step, self.budget.capacity)
        self.limit = max(lowest, min(limit, self.budget.capacity))
        return self.limit


@dataclass(frozen=True)
class Unpaced:
    """All that may be in flight, always."""

    budget: FreshnessBudget

    def observe(self, flow: Flow) -> int:
        """Return the budget's capacity."""
        return self.budget.capacity
