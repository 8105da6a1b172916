"""Planner: how much of each running request's draft is verified, by estimates and budgets (pure).

An engine calls ``wants_drafts`` and, if so, ``plan`` before each decoding step, and reports its
results. The acceptance probability of each drafted token is estimated in every round. The least one
that is worth its cost follows from the objective. For the makespan it is solved for when requests
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
from paceline.spec.budget.switch import Decision, DraftSwitch, ProposalBudget
from paceline.spec.history import Drafts

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
DraftObjective = Literal["makespan", "throughput"]

REPLAN_ROUNDS = 16
GAIN_RATE = 0.25
"""Rate of the moving average of the gain in throughput, once drafting is on."""
PROBE_DRAFT = 2
"""Tokens that a request drafts in a probe; the second one shows how acceptance falls."""
PROBE_SHARE = 8
"""One in this many requests drafts in a probe, others in the next one. In a large batch tokens
cost more than the step does; a probe of all requests would take as long as three plain steps."""


@dataclass(frozen=True)
class RunningRequest:
    """A running request, with ``num_tokens`` of at most ``max_tokens`` generated."""

    request: Hashable
    problem: Hashable
    num_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class DraftVerification:
    """DraftVerification of a step's drafts; arrays int64 [m].

    Of each of ``rows`` of ``drafts`` the engine verified the first ``drafted`` tokens, and accepted
    the first ``accepted`` of those.
    """

    drafts: Drafts
    rows: Integers
    drafted: Integers
    accepted: Integers


@dataclass(frozen=True)
class _MakespanPlan:
    """Length class and least acceptance probability of a token worth drafting, by request; and the
    predicted gain of the whole plan."""

    classes: dict[Hashable, LengthClass]
    least: dict[Hashable, float]
    gain: float


@dataclass
class DraftPlanner:
    """Budgets for one engine; remaining lengths are taken at their expectation.

    ``throughput`` drafts a token where that makes more tokens a second. Where training waits for
    the batch (``max_lag: 0``) the ``objective`` is ``makespan``: besides, the longest requests
    draft all that ends the batch sooner. While requests wait for a place in the engine, and always
    in asynchronous mode, throughput alone counts: a request that ends is followed by another, so
    that only slow tokens lose time. Lengths are not known, only expected. A request that was
    expected to be short may be the last; what it drafts by throughput costs little if it is not.
    A round drafts ``batch_limit`` tokens at most.
    """

    max_draft: int
    objective: DraftObjective = "makespan"
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
        self._proposals = ProposalBudget()
        self._plan: _MakespanPlan | None = None
        self._rounds = 0
        self._num_probes = 0

    def wants_drafts(self) -> bool:
        """Begin a round and tell whether to call the drafter at all, which costs time too.

        While drafting is off, it is called for probes, and as often as ``PROPOSAL_SHARE`` of the
        time allows, to see whether drafting would pay by now.
        """
        self._decision = self.switch.decide(self.predicted_gain)
        return self._decision.draft or self._proposals.are_due

    def took(self, step_seconds: float, proposal_seconds: float) -> None:
        """Account for the round's step, of which the drafter took ``proposal_seconds``; 0 if it was
        not called."""
        self._proposals.spend(step_seconds, 0.0 if self._decision.draft else proposal_seconds)

    def plan(
        self, running: Sequence[RunningRequest], drafts: Drafts, num_waiting: int = 0
    ) -> Integers:
        """Return how many tokens of each request's draft are to be verified, int64 [m].

        ``drafts`` has a row for each of ``running``; ``num_waiting`` requests have no place in the
        engine yet.
        """
        if not running:
            return np.zeros(0, dtype=np.int64)
        survival = self.confidence.survival(drafts)
        wanted, gain = self._most_throughput(running, survival)
        # Once on, rounds without drafts are no evidence that drafting does not pay.
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

    def observe(self, step: DraftVerification) -> None:
        """Learn from the verification of drafts."""
        self.confidence.observe(step.drafts, step.rows, step.drafted, step.accepted)

    def observe_step(self, num_requests: int, num_drafted: int, seconds: float) -> None:
        """Learn the seconds, proposing included, of a step that only decoded ``num_requests``
        requests and verified ``num_drafted`` drafted tokens."""
        self.costs.observe(num_requests + num_drafted, num_requests, seconds)

    def seconds_without(self, num_requests: int, num_accepted: int) -> float:
        """Return the seconds that plain steps would have taken for the tokens of a step."""
        costs = self.costs.costs(num_requests, drafted=False)
        if costs is None:
            return 0.0
        return costs.seconds(num_requests) * (1 + num_accepted / num_requests)

    def finish(self, problem: Hashable, num_tokens: int, finished: bool) -> None:
        """Record the length of a request that ended by itself or, not ``finished``, was cut off."""
        if num_tokens >= 1:
            self.lengths.add(problem, num_tokens, finished)

    def weights_changed(self, keep: float = 0.5) -> None:
        """Scale counts of older weights by ``keep``."""
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
        self, running: Sequence[RunningRequest], survival: Floats
    ) -> tuple[Integers, float]:
        """Return drafts of this round and the predicted gain of the whole plan."""
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

    def _solve_makespan(self, running: Sequence[RunningRequest]) -> _MakespanPlan:
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
        self, running: Sequence[RunningRequest], survival: Floats
    ) -> tuple[Integers, float]:
        """Return drafts of this round and their predicted gain."""
        costs = self._step_costs(len(running))
        if costs is None:
            return np.zeros(len(running), dtype=np.int64), 0.0
        drafted, plain = costs
        budget = throughput_drafts(survival, drafted, self.batch_limit)
        plain_rate = len(running) / plain.seconds(len(running))
        confidence = self._confidence(len(running), float(budget.drafts.sum()))
        return budget.drafts, confidence * float(budget.rate / plain_rate)

    def _step_costs(self, num_requests: int) -> tuple[StepCosts, StepCosts] | None:
        """Return costs of drafted steps and of plain ones; None before the first steps."""
        drafted = self.costs.costs(num_requests, drafted=True)
        plain = self.costs.costs(num_requests, drafted=False)
        return None if drafted is None or plain is None else (drafted, plain)

    def _confidence(self, num_requests: int, drafts: float) -> float:
        """Return the confidence in a drafted step's seconds; gains are discounted by it."""
        prediction = self.costs.predict(num_requests + max(1, round(drafts)), num_requests)
        return 0.0 if prediction is None else prediction.confidence
