"""The task of ``paceline bench rollout``: counting up, told in words; long-tailed, partly random.

``d7s3=`` asks to begin at 3 and add 7, modulo 10, on each line up to the line ``d``. It is answered
``a7 so 0``, ``b7 0+7 then 7``, ``c7 so 4``, ``d7 so 1``, ``#1``: a line says its result in one of
four ways, most often the one that the result prefers; some lines spell the addition out, and some
answers are told once more from the beginning. So samples of one problem share what the problem
dictates and differ where there is a choice, as reasoning does after some reinforcement learning: a
few tokens of high entropy and many that follow.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LABELS = string.ascii_letters
PHRASES = ("so", "then", "hence", "it is")
PREFERENCE = 0.6
"""Probability of the phrase that a result prefers; the others share the rest."""
SPELLED_OUT = 0.3
"""Probability that a line spells the addition out."""
AGAIN = 0.15
"""Probability that an answer is followed by the same once more."""
MEDIAN_LINES, SIGMA, MIN_LINES, MAX_LINES = 6.0, 1.0, 2, 44
"""The number of lines is log-normal; ``SIGMA`` is the standard deviation of its logarithm."""


@dataclass(frozen=True)
class Problem:
    """Number of lines to count, and the digits to begin at and to add."""

    num_lines: int
    start: int
    step: int

    @property
    def prompt(self) -> str:
        """Problem as the model reads it."""
        return f"{LABELS[self.num_lines - 1]}{self.step}s{self.start}="

    def answer(self, random: np.random.Generator) -> str:
        """Draw one of the right answers from their distribution."""
        tellings = [self._telling(random)]
        while random.random() < AGAIN:
            tellings.append(self._telling(random))
        result = (self.start + self.num_lines * self.step) % 10
        return "again\n".join(tellings) + f"#{result}"

    def _telling(self, random: np.random.Generator) -> str:
        lines, total = [], self.start
        for label in LABELS[: self.num_lines]:
            spelled = f" {total}+{self.step}" if random.random() < SPELLED_OUT else ""
            total = (total + self.step) % 10
            lines.append(f"{label}{self.step}{spelled} {_phrase(total, random)} {total}\n")
        return "".join(lines)


def draw_problem(random: np.random.Generator) -> Problem:
    """Draw a problem with a random number of lines."""
    return _problem(random.lognormal(math.log(MEDIAN_LINES), SIGMA), random)


def spread_problems(count: int, seed: int) -> list[Problem]:
    """Draw problems whose numbers of lines are even quantiles: few, yet with the whole tail."""
    random = np.random.default_rng([seed, count])
    logarithm = NormalDist(math.log(MEDIAN_LINES), SIGMA)
    sizes = [math.exp(logarithm.inv_cdf((index + 0.5) / count)) for index in range(count)]
    return [_problem(size, random) for size in sizes]


def _problem(size: float, random: np.random.Generator) -> Problem:
    num_lines = min(max(round(size), MIN_LINES), MAX_LINES)
    return Problem(num_lines, start=int(random.integers(10)), step=int(random.integers(10)))


def _phrase(result: int, random: np.random.Generator) -> str:
    preferred = result % len(PHRASES)
    if random.random() < PREFERENCE:
        return PHRASES[preferred]
    others = [phrase for index, phrase in enumerate(PHRASES) if index != preferred]
    return others[int(random.integers(len(others)))]
