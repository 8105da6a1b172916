"""How many drafted tokens are accepted, per problem and length class, learned online (pure).

With h_j the probability that the j-th token of a draft is accepted after j - 1 were, the first j
are accepted with S_j = h_1 … h_j: Kaplan and Meier's product, in which a shorter draft says nothing
about later positions, and is not counted there. From the S_j follows what a round of d tokens
gains, E_d = S_1 + … + S_d, and so what a request drafts and accepts over its whole length
(``curves.py``): such rounds put out 1 + E_d tokens each, for each of which

    x_d = d / (1 + E_d) were drafted and y_d = E_d / (1 + E_d) came from drafts.

Cutting a draft at d leaves min(accepted, d) tokens accepted: a round of a long draft tells about
all shorter ones, so that k and α of DAS's curve can be fitted to these points, for d = 1/4, 1/2,
3/4 (one token in three rounds of four), 1, 2, …, without drafts ever having been varied. Where the
drafter had less to offer than it was asked for, x and E count what it offered.

Counts of earlier rounds decide how much is drafted, never what is accepted: nothing here can change
what is sampled.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.spec.curves import ExponentialCurves, RoundCurves, fit_curves

Floats = NDArray[np.float64]


def _with_fractions(totals: Floats) -> Floats:
    """Totals [m, 1 + d] of drafts of 0, 1 … d tokens; of a token in 1/4, 1/2, 3/4 of the rounds
    and of 1 … d: [m, 3 + d]."""
    return np.concatenate([totals[:, 1:2] * np.array([0.25, 0.5, 0.75]), totals[:, 1:]], axis=1)


@dataclass(frozen=True)
class AcceptancePrior:
    """What is assumed of drafts before any was verified: S_j = ``rate``^j.

    ``strength`` is how many rounds the prior counts as: for all rounds together, for a length
    class against all, and for a problem against its class.
    """

    rate: float = 0.5
    strength: float = 4.0


@dataclass
class _Counts:
    """Rounds per position, each [max_draft]: all, those that were offered j tokens; those that had
    the j-th verified after j - 1 were accepted, and those that accepted it."""

    asked: Floats
    offered: Floats
    reached: Floats
    accepted: Floats

    @classmethod
    def zeros(cls, max_draft: int) -> _Counts:
        return cls(*np.zeros((4, max_draft)))

    def observe(self, offered: int, drafted: int, accepted: int) -> None:
        self.asked += 1
        self.offered[:offered] += 1
        self.reached[: min(drafted, accepted + 1)] += 1
        self.accepted[:accepted] += 1

    def age(self, factor: float) -> None:
        for counts in (self.asked, self.offered, self.reached, self.accepted):
            counts *= factor


@dataclass(frozen=True)
class _Rates:
    """Probabilities per position, [max_draft]: that the drafter offers j tokens where it is asked
    for as many, and that the j-th is accepted after j - 1 were."""

    offered: Floats
    accepted: Floats

    def updated(self, counts: _Counts | None, strength: float) -> _Rates:
        """What ``counts`` say, with these rates counting as ``strength`` rounds."""
        if counts is None:
            return self
        return _Rates(
            (counts.offered + strength * self.offered) / (counts.asked + strength),
            (counts.accepted + strength * self.accepted) / (counts.reached + strength),
        )


class AcceptanceHistory:
    """Counts of verified drafts by problem, by length class and of all together.

    A problem's rates are shrunk towards its class's, those towards all rounds', those towards the
    prior: an unknown problem is its class, and a position never reached takes the class's h_j.
    """

    def __init__(self, max_draft: int, prior: AcceptancePrior | None = None) -> None:
        """``max_draft`` is the longest draft of one round."""
        assert max_draft >= 1, max_draft
        self.max_draft = max_draft
        self._prior = prior or AcceptancePrior()
        self._all = _Counts.zeros(max_draft)
        self._classes: dict[Hashable, _Counts] = {}
        self._problems: dict[Hashable, _Counts] = {}

    @property
    def num_problems(self) -> int:
        """Problems with counts of their own."""
        return len(self._problems)

    def observe(
        self, problem: Hashable, length_class: Hashable, offered: int, drafted: int, accepted: int
    ) -> None:
        """Take in one round of one request: asked for ``max_draft`` tokens the drafter had
        ``offered``, of which ``drafted`` were verified and the first ``accepted`` held."""
        counts = (accepted, drafted, offered, self.max_draft)
        assert 0 <= accepted <= drafted <= offered <= self.max_draft, counts
        for known in (
            self._all,
            self._counts(self._classes, length_class),
            self._counts(self._problems, problem),
        ):
            known.observe(offered, drafted, accepted)

    def age(self, factor: float) -> None:
        """Let what was seen count ``factor`` as much: the weights changed. A problem of which less
        than half a round is left is forgotten."""
        for counts in (self._all, *self._classes.values(), *self._problems.values()):
            counts.age(factor)
        self._problems = {key: c for key, c in self._problems.items() if c.asked[0] >= 0.5}

    def survival(self, problem: Hashable, length_class: Hashable) -> Floats:
        """S_j for j = 1 … max_draft: probability that the first j tokens offered are accepted."""
        return np.multiply.accumulate(self._rates(problem, length_class).accepted)

    def curves(self, requests: Sequence[tuple[Hashable, Hashable]]) -> RoundCurves:
        """What rounds of each (problem, length class) spend and gain, for budgets."""
        return RoundCurves.from_rates(*self._offered_and_survival(requests))

    def exponential_curves(
        self, requests: Sequence[tuple[Hashable, Hashable]]
    ) -> ExponentialCurves:
        """A(p) of each (problem, length class), fitted to what rounds of every length would do."""
        curves = self.curves(requests)
        drafted, gained = _with_fractions(curves.spent), _with_fractions(curves.gained)
        put_out = 1 + gained
        return fit_curves(drafted / put_out, gained / put_out, np.ones_like(gained))

    def _offered_and_survival(
        self, requests: Sequence[tuple[Hashable, Hashable]]
    ) -> tuple[Floats, Floats]:
        rates = [self._rates(problem, length_class) for problem, length_class in requests]
        # Offering j tokens includes offering fewer; shrinking each position alone may break that.
        offered = np.minimum.accumulate([rate.offered for rate in rates], axis=1)
        return offered, np.multiply.accumulate([rate.accepted for rate in rates], axis=1)

    def _counts(self, table: dict[Hashable, _Counts], key: Hashable) -> _Counts:
        if key not in table:
            table[key] = _Counts.zeros(self.max_draft)
        return table[key]

    def _rates(self, problem: Hashable, length_class: Hashable) -> _Rates:
        strength = self._prior.strength
        rates = _Rates(np.ones(self.max_draft), np.full(self.max_draft, self._prior.rate))
        for counts in (
            self._all,
            self._classes.get(length_class),
            self._problems.get(problem),
        ):
            rates = rates.updated(counts, strength)
        return rates
