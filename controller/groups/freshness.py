"""Staleness as capacity: how much work may be in flight so that nothing trained is too old (pure).

A group holds a slot from its admission until the engines serve the weights that training on it
made. With B slots, P groups a step, and finished groups taken from the W oldest only:

- when a group is admitted, at most B - 1 others hold slots, and every step the engines have not
  caught up with is among them: so the group's first token is of the version *before* those groups;
- at most W - 1 groups admitted later may be trained before it;
- so at most B + W - 2 groups are trained between the version that sampled it and its own step,
  which is ``(B + W - 2) // P`` whole steps.

The division takes every step to use up P admissions. So a step that trains fewer than P groups
holds slots of dropped groups in their stead until its weights are served; dropped groups beyond
those free their slots at once (`AssembledBatch.slots`).

``max_lag`` S is what the user promises, so the window is paid for in capacity:
``B = (S + 1) P - (W - 1)`` gives ``(B + W - 2) // P == S`` exactly, for every W.

Example with P = 4, S = 1: strict order has W = 1, B = 8, oldest age (8 + 1 - 2) // 4 = 1; a window
of 3 leaves B = 6 slots and again (6 + 3 - 2) // 4 = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.configs.errors import ConfigError


@dataclass(frozen=True)
class FreshnessBudget:
    """``capacity`` groups in flight, taken from the ``window`` oldest, P a step."""

    capacity: int
    window: int
    groups_per_step: int

    @property
    def max_age(self) -> int:
        """Upper bound of the age of any trained token, in weight versions."""
        return (self.capacity + self.window - 2) // self.groups_per_step


def freshness_budget(
    groups_per_step: int, max_lag: int, window_fraction: float = 0.0
) -> FreshnessBudget:
    """The largest budget whose ``max_age`` is ``max_lag``.

    The window is ``window_fraction`` of the slots there would be without one, but never so large
    that fewer than one step's groups fit (a batch could then never be filled), nor larger than what
    is in flight.

    Raises:
        ConfigError: a count is out of range.
    """
    if groups_per_step < 1 or max_lag < 0 or not 0 <= window_fraction < 1:
        raise ConfigError(
            f"got groups_per_step {groups_per_step}, max_lag {max_lag}, window_fraction "
            f"{window_fraction}; expected groups_per_step >= 1, max_lag >= 0, "
            "0 <= window_fraction < 1"
        )
    slots = (max_lag + 1) * groups_per_step
    largest_window = min(max_lag * groups_per_step + 1, (slots + 1) // 2)
    window = max(1, min(int(window_fraction * slots), largest_window))
    return FreshnessBudget(slots - (window - 1), window, groups_per_step)
