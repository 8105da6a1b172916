"""Algorithms: what a finished group and its samples are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.configs.vocabulary import Group


class Algorithm(Protocol):
    """Advantages of a group's samples."""

    @property
    def max_draws(self) -> int:
        """A step looks at this many times its groups before it trains on fewer."""

    def drop_reason(self, group: Group) -> str | None:
        """Why a group is not worth training on, in a word for the ledger; None to train it."""

    def advantages(self, group: Group) -> NDArray[np.float64]:
        """One advantage a sample, float64 [n]."""


def group_relative_advantages(
    rewards: NDArray[np.float64], *, normalize_std: bool, epsilon: float = 1e-6
) -> NDArray[np.float64]:
    """Advantages of samples [n] of one prompt against their mean.

    GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2): ``(r - mean) / std``, with the sample
    standard deviation (n - 1); without ``normalize_std`` it is Dr.GRPO's ``r - mean`` (Liu et al.
    2025, arXiv 2503.20783, eq. 3). Equal rewards give exactly zero.
    """
    centred = rewards - rewards.mean()
    if not normalize_std or np.ptp(rewards) == 0:
        return centred if np.ptp(rewards) else np.zeros_like(rewards)
    return centred / (rewards.std(ddof=1) + epsilon)


@dataclass(frozen=True)
class GRPO:
    """Group-relative policy optimisation; groups of equal rewards carry no gradient."""

    normalize_std: bool = True
    drop_zero_signal: bool = True
    max_draws: int = 8

    def drop_reason(self, group: Group) -> str | None:
        """``zero_signal`` where all rewards are equal."""
        if self.drop_zero_signal and np.ptp(group.rewards) == 0:
            return "zero_signal"
        return None

    def advantages(self, group: Group) -> NDArray[np.float64]:
        """Group-relative advantages [n]."""
        return group_relative_advantages(group.rewards, normalize_std=self.normalize_std)


@dataclass(frozen=True)
class Supervised:
    """Imitation: every demonstration token counts the same."""

    max_draws: int = 1

    def drop_reason(self, group: Group) -> str | None:
        """Demonstrations are never dropped."""
        return None

    def advantages(self, group: Group) -> NDArray[np.float64]:
        """Ones [n]."""
        return np.ones(len(group.trajectories))
