"""Which finished groups are worth training on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.configs.vocabulary import Group


@dataclass(frozen=True)
class SignalFilter:
    """Dynamic sampling: groups whose rewards are all equal carry no gradient and are replaced.

    Yu et al. 2025 (DAPO, arXiv 2503.14476, section 3.2). With ``drops_equal`` a step looks at up to
    ``max_draws`` times its groups before it makes do with fewer; without, every group is trained.
    """

    drops_equal: bool = True
    max_draws: int = 8

    def drop_reason(self, group: Group) -> str | None:
        """Why a group is not worth training on, in a word for the ledger; None to train it."""
        if group.fault is not None:
            return group.fault
        if self.drops_equal and np.ptp(group.rewards) == 0:
            return "zero_signal"
        return None


EVERYTHING = SignalFilter(drops_equal=False, max_draws=1)
"""Demonstrations: each is trained on as it comes."""
