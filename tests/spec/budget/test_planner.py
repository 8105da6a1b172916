"""Whole batches on a simulated engine: drafting helps where it can, and nowhere hurts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from paceline.spec.budget.planner import (
    DraftObjective,
    DraftPlanner,
    DraftVerification,
    RunningRequest,
)
from paceline.spec.history import Drafts

MAX_DRAFT = 7
MAX_TOKENS = 4096


def offered(beliefs: NDArray[np.float64], num_tokens: int = MAX_DRAFT) -> Drafts:
    """Whole drafts, of which the drafter believes so much: whether it is right is not its task."""
    shape = len(beliefs), MAX_DRAFT
    return Drafts(
        tokens=np.ones(shape, dtype=np.int32),
        probabilities=np.broadcast_to(beliefs[:, None], shape).astype(np.float32),
        num_tokens=np.full(len(beliefs), num_tokens, dtype=np.int32),
        matches=np.full(len(beliefs), 8, dtype=np.int32),
        generations=np.zeros(len(beliefs), dtype=np.int64),
    )


@dataclass
class SimulatedEngine:
    """An engine of ``places`` requests whose steps cost as measured on vLLM, in virtual time.

    A problem's drafts hold with its own probability a token; drafting itself costs ``overhead``
    seconds a step.
    """

    rates: NDArray[np.float64]
    lengths: NDArray[np.int64]
    places: int
    overhead: float = 0.5e-3
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))

    def run(self, planner: DraftPlanner | None) -> float:
        """Seconds until every request is done."""
        waiting = list(range(len(self.lengths)))
        done: dict[int, int] = {}
        seconds = 0.0
        while waiting or done:
            while waiting and len(done) < self.places:
                done[waiting.pop(0)] = 0
            seconds += self._step(done, len(waiting), planner)
        return seconds

    def _step(self, done: dict[int, int], num_waiting: int, planner: DraftPlanner | None) -> float:
        running = [
            RunningRequest(i, int(i) % len(self.rates), n, MAX_TOKENS) for i, n in done.items()
        ]
        drafts = offered(np.array([self.rates[int(str(one.problem))] for one in running]))
        allowed = np.zeros(len(done), np.int64)
        if planner:
            planner.wants_drafts()
            allowed = planner.plan(running, drafts, num_waiting)
        accepted = np.array(
            [self._accepted(one.problem, d) for one, d in zip(running, allowed, strict=True)]
        )
        seconds = 9e-3 + 0.55e-3 * (len(running) + allowed.sum()) + self.overhead * allowed.any()
        seconds *= 1 + 0.03 * self.random.standard_normal()
        if planner:
            planner.observe(DraftVerification(drafts, np.arange(len(running)), allowed, accepted))
            planner.observe_step(len(running), int(allowed.sum()), float(seconds))
        for one, gained in zip(running, accepted, strict=True):
            i = int(str(one.request))
            done[i] += 1 + int(gained)
            if done[i] >= self.lengths[i]:
                del done[i]
                if planner:
                    planner.finish(one.problem, int(self.lengths[i]), finished=True)
        return float(seconds)

    def _accepted(self, problem: object, drafted: int) -> int:
        held = self.random.random(drafted) < self.rates[int(str(problem))]
        return int(np.cumprod(held).sum())


def planned(
    planner: DraftPlanner, running: list[RunningRequest], drafts: Drafts, num_rounds: int
) -> NDArray[np.int64]:
    """Tokens drafted for each request in so many rounds."""
    total = np.zeros(len(running), dtype=np.int64)
    for _ in range(num_rounds):
        planner.wants_drafts()
        total += planner.plan(running, drafts)
    return total


def long_tailed(num_requests: int, seed: int = 0) -> NDArray[np.int64]:
    lengths = np.random.default_rng(seed).lognormal(4, 1, num_requests)
    return np.clip(lengths, 1, MAX_TOKENS).astype(np.int64)


def speed_up(rate: float, places: int, objective: DraftObjective) -> float:
    """Of as many steps, more or less, whatever the number of places."""
    lengths = long_tailed(min(128, 32 * places))
    rates = np.full(16, rate)
    plain = SimulatedEngine(rates, lengths, places).run(None)
    drafted = SimulatedEngine(rates, lengths, places).run(DraftPlanner(MAX_DRAFT, objective))
    return plain / drafted


HARMLESS = [(0.0, 1), (0.0, 32), (0.0, 128), (0.2, 8), (0.2, 128), (0.5, 128)]
PAYING = [(0.9, 1, 2.2), (0.9, 8, 1.4), (0.7, 1, 1.5), (0.9, 128, 1.15)]


def with_objectives(cases: Sequence[tuple[float, ...]]) -> list[tuple[float | str, ...]]:
    """With one place the objectives differ while the last request runs: one of them is enough."""
    objectives = get_args(DraftObjective)
    return [(*case, one) for case in cases for one in objectives[: 1 if case[1] == 1 else None]]


@pytest.mark.parametrize(("rate", "places", "objective"), with_objectives(HARMLESS))
def test_drafting_is_never_slower_than_97_hundredths_of_none(
    rate: float, places: int, objective: DraftObjective
) -> None:
    assert speed_up(rate, places, objective) > 0.97


@pytest.mark.parametrize(("rate", "places", "least", "objective"), with_objectives(PAYING))
def test_drafting_pays_where_drafts_hold(
    rate: float, places: int, least: float, objective: DraftObjective
) -> None:
    assert speed_up(rate, places, objective) > least


def test_the_longest_requests_of_a_batch_draft_most_and_short_ones_nothing() -> None:
    planner = DraftPlanner(MAX_DRAFT, "makespan")
    rates = np.full(16, 0.7)
    lengths = np.array([30] * 120 + [900] * 8)
    SimulatedEngine(rates, np.tile(lengths, 2), 128).run(planner)
    for problem, length in [("short", 30), ("long", 900)] * 8:
        planner.finish(problem, length, finished=True)
    running = [RunningRequest(i, "short", 0, MAX_TOKENS) for i in range(60)]
    running += [RunningRequest(60 + i, "long", 0, MAX_TOKENS) for i in range(4)]
    offers = offered(np.full(len(running), 0.7))
    drafts = planned(planner, running, offers, 32)
    assert drafts[:60].max() <= 4  # probes alone
    assert drafts[60:].min() > 32


def test_problems_whose_drafts_hold_draft_more() -> None:
    planner = DraftPlanner(MAX_DRAFT, "throughput")
    rates = np.array([0.95, 0.05])
    SimulatedEngine(rates, np.full(64, 200), 4).run(planner)
    running = [RunningRequest("a", 0, 50, MAX_TOKENS), RunningRequest("b", 1, 50, MAX_TOKENS)]
    offers = offered(rates)
    drafts = planned(planner, running, offers, 8)
    assert drafts[0] > 3 * drafts[1]


def test_limits_hold_in_every_round() -> None:
    planner = DraftPlanner(MAX_DRAFT, "makespan", batch_limit=10)

    def check(plan: Callable[..., NDArray[np.int64]]) -> Callable[..., NDArray[np.int64]]:
        def checked(
            running: list[RunningRequest], drafts: Drafts, waiting: int
        ) -> NDArray[np.int64]:
            drafts.num_tokens[:] = np.arange(len(running)) % 5
            chosen = plan(running, drafts, waiting)
            assert (chosen >= 0).all() and (chosen <= drafts.num_tokens).all()
            assert chosen.sum() <= 10
            return chosen

        return checked

    planner.plan = check(planner.plan)  # type: ignore[method-assign]
    SimulatedEngine(np.full(4, 0.9), long_tailed(40), 16).run(planner)


def test_nothing_runs_nothing_is_drafted_and_a_weight_update_keeps_it_going() -> None:
    planner = DraftPlanner(MAX_DRAFT)
    assert planner.plan([], offered(np.zeros(0))).shape == (0,)
    engine = SimulatedEngine(np.full(4, 0.9), np.full(16, 100), 1)
    first = engine.run(planner)
    planner.weights_changed()
    assert engine.run(planner) < 1.1 * first
