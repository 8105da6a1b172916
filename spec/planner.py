"""How much each running request may draft this round: estimates and budgets put together (pure).

An engine asks ``plan`` before each decoding step and tells ``observe`` what came of it. Estimates
of lengths and acceptance, and the makespan's solution, are renewed when requests come or go and
every ``REPLAN_ROUNDS`` rounds; in between a round costs a few array operations.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from paceline.spec.acceptance import AcceptanceHistory, AcceptancePrior
from paceline.spec.budget import (
    RoundLimits,
    makespan_budget,
    makespan_seconds,
    throughput_drafts,
)
from paceline.spec.cost_model import CostModel, StepCosts
from paceline.spec.lengths import LengthClass, LengthHistory
from paceline.spec.rounding import DraftRounding, within_batch
from paceline.spec.switch import DraftSwitch

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Objective = Literal["makespan", "throughput"]

REPLAN_ROUNDS = 16
PROBE_DRAFT = 2
"""Tokens that a request drafts in a probe: the second shows how acceptance falls."""
PROBE_SHARE = 8
"""One in so many requests drafts in a probe, the next ones in the next: in a large batch tokens
cost more than the step does, and a probe of all would take as long as three plain steps."""


@dataclass(frozen=True)
class Running:
    """A request as it stands: ``num_tokens`` of at most ``max_tokens`` are generated.

    ``worth`` is what one of its tokens counts where throughput is the objective.
    """

    request: Hashable
    problem: Hashable
    num_tokens: int
    max_tokens: int
    worth: float = 1.0


@dataclass(frozen=True)
class Verified:
    """A decoding step: what the requests of it had drafted, and what came of that; arrays [m].

    The drafter had ``offered`` tokens, of the ``max_draft`` it was asked for; the engine verified
    the first ``drafted`` of them, and ``accepted`` the first so many of those.
    """

    running: Sequence[Running]
    offered: Integers
    drafted: Integers
    accepted: Integers


@dataclass(frozen=True)
class _Estimates:
    """What is believed of the running requests until the next renewal, in their order.

    For throughput ``survival`` [m, max_draft]; for the makespan drafts ``per_round`` [m], and the
    ``gain`` they promise.
    """

    requests: list[Hashable]
    classes: dict[Hashable, LengthClass]
    survival: Floats | None = None
    per_round: Floats | None = None
    gain: float = 0.0


@dataclass
class DraftPlanner:
    """Budgets for one engine; remaining lengths are taken at their expectation.

    ``objective`` is ``makespan`` where training waits for the batch (``max_lag: 0``): the longest
    requests get most. While requests wait for a place in the engine, and in asynchronous mode
    always, it is ``throughput``: whatever ends is followed by something else, so that time is lost
    by slow tokens only.
    """

    max_draft: int
    objective: Objective = "makespan"
    batch_limit: int | None = None
    prior: AcceptancePrior = field(default_factory=AcceptancePrior)
    switch: DraftSwitch = field(default_factory=DraftSwitch)

    def __post_init__(self) -> None:
        assert self.max_draft >= 1, self.max_draft
        self.costs = CostModel()
        self.acceptance = AcceptanceHistory(self.max_draft, self.prior)
        self.lengths = LengthHistory()
        self.predicted_gain = 0.0
        self._rounding = DraftRounding(self.max_draft)
        self._estimates: _Estimates | None = None
        self._rounds = 0
        self._num_probes = 0

    def plan(
        self,
        running: Sequence[Running],
        num_waiting: int = 0,
        offered: Integers | None = None,
    ) -> Integers:
        """Tokens that each request may draft in the coming step, [m], 0 to ``max_draft``.

        ``num_waiting`` requests have no place in the engine yet; ``offered`` [m] is how many tokens
        the drafter has, where it was asked before.
        """
        if not running:
            return np.zeros(0, dtype=np.int64)
        estimates = self._current(running, num_waiting)
        if estimates.per_round is not None:
            self.predicted_gain = estimates.gain
        else:
            assert estimates.survival is not None
            drafts, gain = self._most_throughput(running, estimates.survival, offered)
            self.predicted_gain = gain
        decision = self.switch.decide(self.predicted_gain)
        if not decision.draft:
            return np.zeros(len(running), dtype=np.int64)
        if decision.probe:
            return self._probe(len(running), offered)
        if estimates.per_round is None:
            return drafts
        return self._rounding.round(
            estimates.requests, estimates.per_round, offered, self.batch_limit
        )

    def observe(self, step: Verified, seconds: float | None) -> None:
        """Take in a decoding step of requests planned for.

        ``seconds`` is the whole step, proposing included; None if it did more than decode these.
        """
        num_drafted = int(step.drafted.sum())
        if num_drafted:
            for i, one in enumerate(step.running):
                counts = int(step.offered[i]), int(step.drafted[i]), int(step.accepted[i])
                self.acceptance.observe(one.problem, self._class(one), *counts)
        if seconds is not None and step.running:
            self.costs.observe(len(step.running) + num_drafted, len(step.running), seconds)

    def seconds_without(self, step: Verified) -> float:
        """What plain steps would have taken for the tokens of this one, by the fitted costs."""
        num_requests = len(step.running)
        costs = self.costs.costs(num_requests, drafted=False) if num_requests else None
        if costs is None:
            return 0.0
        return costs.seconds(num_requests) * (1 + float(step.accepted.sum()) / num_requests)

    def finish(self, problem: Hashable, num_tokens: int, finished: bool) -> None:
        """A request ended by itself, or (not ``finished``) was cut off."""
        if num_tokens >= 1:
            self.lengths.add(problem, num_tokens, finished)

    def weights_changed(self, keep: float = 0.5) -> None:
        """Let lengths and acceptance seen under older weights count ``keep`` as much."""
        self.lengths.age(keep)
        self.acceptance.age(keep)
        self._estimates = None

    def _probe(self, num_requests: int, offered: Integers | None) -> Integers:
        stride = min(PROBE_SHARE, num_requests)
        self._num_probes += 1
        chosen = np.arange(num_requests) % stride == self._num_probes % stride
        drafts = np.where(chosen, min(PROBE_DRAFT, self.max_draft), 0)
        drafts = drafts if offered is None else np.minimum(drafts, offered)
        return drafts if self.batch_limit is None else within_batch(drafts, self.batch_limit)

    def _class(self, one: Running) -> LengthClass:
        if self._estimates is not None and one.request in self._estimates.classes:
            return self._estimates.classes[one.request]
        return self.lengths.length_class(one.problem, one.num_tokens)

    def _current(self, running: Sequence[Running], num_waiting: int) -> _Estimates:
        requests = [one.request for one in running]
        by_makespan = self.objective == "makespan" and not num_waiting
        self._rounds += 1
        known = self._estimates
        if (
            known is None
            or known.requests != requests
            or (known.per_round is not None) != by_makespan
            or self._rounds >= REPLAN_ROUNDS
        ):
            known = self._estimates = self._estimate(running, by_makespan)
            self._rounds = 0
        return known

    def _estimate(self, running: Sequence[Running], by_makespan: bool) -> _Estimates:
        requests = [one.request for one in running]
        self.lengths.set_running((one.problem, one.num_tokens) for one in running)
        classes = [self.lengths.length_class(one.problem, one.num_tokens) for one in running]
        keys = [(one.problem, name) for one, name in zip(running, classes, strict=True)]
        by_request = dict(zip(requests, classes, strict=True))
        if by_makespan:
            per_round, gain = self._least_makespan(running, keys)
            return _Estimates(requests, by_request, per_round=per_round, gain=gain)
        survival = np.array([self.acceptance.survival(*key) for key in keys])
        return _Estimates(requests, by_request, survival=survival)

    def _least_makespan(
        self, running: Sequence[Running], keys: list[tuple[Hashable, LengthClass]]
    ) -> tuple[Floats, float]:
        """Drafts a round and the gain they promise."""
        none = np.zeros(len(running))
        costs = self._step_costs(len(running))
        if costs is None:
            return none, 0.0
        drafted, plain = costs
        remaining = np.array(
            [
                self.lengths.expected_remaining(one.problem, one.num_tokens, one.max_tokens)
                for one in running
            ]
        )
        together = np.inf if self.batch_limit is None else self.batch_limit
        limits = RoundLimits(self.max_draft, together)
        budget = makespan_budget(remaining, self.acceptance.curves(keys), drafted, limits)
        without = makespan_seconds(remaining, none, float(remaining.max()), plain)
        confidence = self._confidence(len(running), float(budget.per_round.sum()))
        return budget.per_round, confidence * without / budget.seconds

    def _most_throughput(
        self, running: Sequence[Running], survival: Floats, offered: Integers | None
    ) -> tuple[Integers, float]:
        """Drafts of this round and the gain they promise."""
        costs = self._step_costs(len(running))
        if costs is None:
            return np.zeros(len(running), dtype=np.int64), 0.0
        drafted, plain = costs
        worth = np.array([one.worth for one in running])
        budget = throughput_drafts(survival, drafted, offered, self.batch_limit, worth)
        plain_rate = worth.sum() / plain.seconds(len(running))
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
