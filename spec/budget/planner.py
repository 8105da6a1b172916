"""How much of its draft each running request has verified: estimates and budgets together (pure).

An engine asks ``wants_drafts`` and, if so, ``plan`` before each decoding step, and tells what came
of it. How likely each drafted token is to hold is estimated in every round; how likely it must be
to be worth its cost is a matter of the objective. For the makespan that is solved when requests
come and every ``REPLAN_ROUNDS`` rounds; in between a round costs a few array operations.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from paceline.spec.budget.acceptance import AcceptanceHistory
from paceline.spec.budget.budget import (
    RoundLimits,
    makespan_budget,
    makespan_seconds,
    throughput_drafts,
    within_batch,
)
from paceline.spec.budget.confidence import DraftConfidence
from paceline.spec.budget.cost_model import CostModel, StepCosts
from paceline.spec.budget.lengths import LengthClass, LengthHistory
from paceline.spec.budget.switch import Decision, DraftSwitch, LookBudget
from paceline.spec.history import Drafts

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Objective = Literal["makespan", "throughput"]

REPLAN_ROUNDS = 16
GAIN_RATE = 0.25
"""Share by which a round moves the gain that throughput promises, once drafting is on."""
PROBE_DRAFT = 2
"""Tokens that a request drafts in a probe: the second shows how acceptance falls."""
PROBE_SHARE = 8
"""One in so many requests drafts in a probe, the next ones in the next: in a large batch tokens
cost more than the step does, and a probe of all would take as long as three plain steps."""


@dataclass(frozen=True)
class Running:
    """A request as it stands: ``num_tokens`` of at most ``max_tokens`` are generated."""

    request: Hashable
    problem: Hashable
    num_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Verified:
    """What came of drafts in a step; arrays [m].

    They are ``rows`` of the ``drafts`` that were planned with; the engine verified the first
    ``drafted`` tokens of each, and ``accepted`` the first so many of those.
    """

    drafts: Drafts
    rows: Integers
    drafted: Integers
    accepted: Integers


@dataclass(frozen=True)
class _MakespanPlan:
    """By request: its length class, and the least probability a token must hold with to be worth
    drafting; and the gain that all of it promises."""

    classes: dict[Hashable, LengthClass]
    least: dict[Hashable, float]
    gain: float


@dataclass
class DraftPlanner:
    """Budgets for one engine; remaining lengths are taken at their expectation.

    A token is drafted where it makes more tokens a second. Where training waits for the batch
    (``max_lag: 0``) the ``objective`` is ``makespan``: besides, the longest requests draft whatever
    ends the batch sooner. While requests wait for a place in the engine, and in asynchronous mode
    always, it is ``throughput`` alone: whatever ends is followed by something else, so that time is
    lost by slow tokens only. Lengths are not known, only expected: a request that should have been
    short may be the last, and what it drafts by throughput costs next to nothing if it is not.
    A round drafts ``batch_limit`` tokens at most.
    """

    max_draft: int
    objective: Objective = "makespan"
    batch_limit: int = 1 << 30
    switch: DraftSwitch = field(default_factory=DraftSwitch)

    def __post_init__(self) -> None:
        assert self.max_draft >= 1, self.max_draft
        self.costs = CostModel()
        self.confidence = DraftConfidence()
        self.acceptance = AcceptanceHistory()
        self.lengths = LengthHistory()
        self.predicted_gain = 0.0
        self._throughput_gain = 0.0
        self._decision = Decision(draft=False, probe=False)
        self._looks = LookBudget()
        self._plan: _MakespanPlan | None = None
        self._rounds = 0
        self._num_probes = 0

    def wants_drafts(self) -> bool:
        """Begin a round: whether to ask the drafter at all, which costs time too.

        Where drafting is off that is done for probes, and as often as ``LOOK_SHARE`` of the time
        allows: to see whether it would pay by now.
        """
        self._decision = self.switch.decide(self.predicted_gain)
        return self._decision.draft or self._looks.are_due

    def took(self, step_seconds: float, look_seconds: float) -> None:
        """The round's step is over; ``look_seconds`` of it went into asking the drafter, 0 if it
        was not asked."""
        self._looks.spend(step_seconds, 0.0 if self._decision.draft else look_seconds)

    def plan(self, running: Sequence[Running], drafts: Drafts, num_waiting: int = 0) -> Integers:
        """How many tokens of its draft each request is to have verified, [m].

        ``drafts`` has a row for each of ``running``; ``num_waiting`` requests have no place in the
        engine yet.
        """
        if not running:
            return np.zeros(0, dtype=np.int64)
        survival = self.confidence.survival(drafts)
        wanted, gain = self._most_throughput(running, survival)
        # Once on, rounds that have nothing to draft do not say that drafting does not pay.
        rate = GAIN_RATE if self.switch.is_on else 1.0
        self._throughput_gain += rate * (gain - self._throughput_gain)
        self.predicted_gain = self._throughput_gain
        if self.objective == "makespan" and not num_waiting:
            longest, gain = self._least_makespan(running, survival)
            wanted = np.maximum(wanted, longest)
            self.predicted_gain = max(self.predicted_gain, gain)
        if not self._decision.draft:
            return np.zeros_like(wanted)
        if self._decision.probe:
            wanted = self._probe(drafts.num_tokens)
        return within_batch(wanted, self.batch_limit)

    def observe(self, step: Verified) -> None:
        """Take in what came of drafts."""
        self.confidence.observe(step.drafts, step.rows, step.drafted, step.accepted)

    def observe_step(self, num_requests: int, num_drafted: int, seconds: float) -> None:
        """Take in the seconds, proposing included, of a step that decoded ``num_requests`` requests
        and nothing else, and verified ``num_drafted`` drafted tokens."""
        self.costs.observe(num_requests + num_drafted, num_requests, seconds)

    def seconds_without(self, num_requests: int, num_accepted: int) -> float:
        """What plain steps would have taken for the tokens of a step, by the fitted costs."""
        costs = self.costs.costs(num_requests, drafted=False)
        if costs is None:
            return 0.0
        return costs.seconds(num_requests) * (1 + num_accepted / num_requests)

    def finish(self, problem: Hashable, num_tokens: int, finished: bool) -> None:
        """A request ended by itself, or (not ``finished``) was cut off."""
        if num_tokens >= 1:
            self.lengths.add(problem, num_tokens, finished)

    def weights_changed(self, keep: float = 0.5) -> None:
        """Let what was seen under older weights count ``keep`` as much."""
        for history in (self.lengths, self.acceptance, self.confidence):
            history.age(keep)
        self.switch.weights_changed()
        self._plan = None

    def _probe(self, offered: NDArray[np.int32]) -> Integers:
        stride = min(PROBE_SHARE, len(offered))
        self._num_probes += 1
        chosen = np.arange(len(offered)) % stride == self._num_probes % stride
        return np.where(chosen, np.minimum(offered, PROBE_DRAFT), 0).astype(np.int64)

    def _least_makespan(
        self, running: Sequence[Running], survival: Floats
    ) -> tuple[Integers, float]:
        """Drafts of this round and the gain that the whole plan promises."""
        self._rounds += 1
        is_known = self._plan is not None and all(
            one.request in self._plan.least for one in running
        )
        if not is_known or self._rounds >= REPLAN_ROUNDS:
            self._plan, self._rounds = self._solve_makespan(running), 0
        assert self._plan is not None
        classes = self._plan.classes
        self.acceptance.observe([(one.problem, classes[one.request]) for one in running], survival)
        least = np.array([self._plan.least[one.request] for one in running])
        return (survival >= least[:, None]).sum(axis=1), self._plan.gain

    def _solve_makespan(self, running: Sequence[Running]) -> _MakespanPlan:
        names = [one.request for one in running]
        self.lengths.set_running((one.problem, one.num_tokens) for one in running)
        classes = [self.lengths.length_class(one.problem, one.num_tokens) for one in running]
        by_name = dict(zip(names, classes, strict=True))
        costs = self._step_costs(len(running))
        if costs is None:
            return _MakespanPlan(by_name, dict.fromkeys(names, np.inf), 0.0)
        drafted, plain = costs
        remaining = np.array(
            [
                self.lengths.expected_remaining(one.problem, one.num_tokens, one.max_tokens)
                for one in running
            ]
        )
        keys = [(one.problem, name) for one, name in zip(running, classes, strict=True)]
        limits = RoundLimits(self.max_draft, self.batch_limit)
        budget = makespan_budget(remaining, self.acceptance.curves(keys), drafted, limits)
        none = np.zeros(len(running))
        without = makespan_seconds(remaining, none, float(remaining.max()), plain)
        confidence = self._confidence(len(running), float(budget.per_round.sum()))
        least = dict(zip(names, budget.least.tolist(), strict=True))
        return _MakespanPlan(by_name, least, confidence * without / budget.seconds)

    def _most_throughput(
        self, running: Sequence[Running], survival: Floats
    ) -> tuple[Integers, float]:
        """Drafts of this round and the gain they promise."""
        costs = self._step_costs(len(running))
        if costs is None:
            return np.zeros(len(running), dtype=np.int64), 0.0
        drafted, plain = costs
        budget = throughput_drafts(survival, drafted, self.batch_limit)
        plain_rate = len(running) / plain.seconds(len(running))
        confidence = self._confidence(len(running), float(budget.drafts.sum()))
        return budget.drafts, confidence * float(budget.rate / plain_rate)

    def _step_costs(self, num_requests: int) -> tuple[StepCosts, StepCosts] | None:
        """Of drafted steps and of plain ones; None before the first steps were seen."""
        drafted = self.costs.costs(num_requests, drafted=True)
        plain = self.costs.costs(num_requests, drafted=False)
        return None if drafted is None or plain is None else (drafted, plain)

    def _confidence(self, num_requests: int, drafts: float) -> float:
        """In the seconds of a drafted step: what is not known well must promise more."""
        prediction = self.costs.predict(num_requests + max(1, round(drafts)), num_requests)
        return 0.0 if prediction is None else prediction.confidence
