"""Pacing: as much work in flight as keeps the learner busy, in virtual time with exact rates."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.controller.groups.freshness import freshness_budget
from paceline.controller.groups.pacing import Flow, Pacer, Unpaced
from tests.controller.builders import make_group
from tests.controller.test_loop import Update, World, build_loop
from tests.controller.virtual_time import run_virtually

GROUPS = 8


@dataclass(frozen=True)
class Rates:
    """Seconds a step takes the learner; median seconds of a group, long-tailed; groups that the
    engines sample side by side."""

    step: float
    group: float
    slots: int


class TimedWorld(World):
    """The fakes of the loop's tests, taking time."""

    def __init__(self, rates, seed=0):
        super().__init__(seed)
        self.rates = rates
        self.busy = 0.0
        self.room = asyncio.Semaphore(rates.slots)

    async def pause(self):
        pass

    async def generate(self, work):
        async with self.room:
            version = self.served_version
            await asyncio.sleep(self.rates.group * self.random.lognormvariate(0, 0.8))
            return make_group(work.group_id, (0.0, 1.0), version)

    async def forward_backward(self, batch, loss):
        seconds = self.rates.step * self.random.uniform(0.9, 1.1)
        await asyncio.sleep(seconds)
        self.busy += seconds
        self.trained.append(batch.group_ids)
        return Update(self, batch)


@dataclass(frozen=True)
class Outcome:
    utilisation: float
    mean_age: float
    max_age: int
    limit: int
    samples_dropped_for_age: int


def outcome(rates, *, paced, lag=4, window=0.0, steps=300, first=60):
    """Steady state of a run: what the learner did after its first steps."""

    async def scenario():
        world = TimedWorld(rates)
        loop = build_loop(world, groups=GROUPS, lag=lag, window=window, steps=steps)
        loop.pace = Pacer(loop.budget) if paced else Unpaced(loop.budget)
        began = asyncio.get_running_loop().time()

        async def after_step(step):
            nonlocal began
            world.ages += step.batch.ages
            if step.batch.batch.step == first:
                world.ages.clear()
                world.busy, began = 0.0, asyncio.get_running_loop().time()
            return False

        world.after_step = after_step
        await loop.run()
        elapsed = asyncio.get_running_loop().time() - began
        generated = sum(len(batch) for batch in world.trained) + len(loop.buffer.unreleased())
        return Outcome(
            world.busy / elapsed,
            sum(world.ages) / len(world.ages),
            max(world.ages),
            loop.buffer.limit,
            loop.journal.state.admitted - generated,
        )

    return run_virtually(scenario())


SLOW_LEARNER = Rates(step=10.0, group=1.0, slots=16)
SLOW_ROLLOUTS = Rates(step=1.0, group=10.0, slots=16)


def test_with_a_slow_learner_pacing_trains_fresher_groups_and_keeps_it_as_busy():
    free, paced = (outcome(SLOW_LEARNER, paced=paced) for paced in (False, True))
    assert free.utilisation > 0.99
    assert paced.utilisation > free.utilisation - 0.01
    assert paced.mean_age < free.mean_age / 2
    assert paced.limit <= freshness_budget(GROUPS, 4).capacity / 2


def test_with_slow_rollouts_pacing_uses_the_whole_budget_and_loses_nothing():
    free, paced = (outcome(SLOW_ROLLOUTS, paced=paced, window=0.25) for paced in (False, True))
    assert paced.utilisation > 0.98 * free.utilisation
    assert paced.limit == freshness_budget(GROUPS, 4, 0.25).capacity


@pytest.mark.parametrize("rates", [SLOW_LEARNER, SLOW_ROLLOUTS])
@pytest.mark.parametrize("paced", [False, True])
def test_no_group_is_dropped_for_its_age(rates, paced):
    result = outcome(rates, paced=paced)
    assert result.samples_dropped_for_age == 0
    assert result.max_age <= 4


def test_a_learner_that_speeds_up_gets_more_work_again():
    budget = freshness_budget(GROUPS, 4)
    pacer = Pacer(budget)
    for _ in range(30):
        pacer.observe(Flow(waited=0.0, elapsed=1.0, surplus=20))
    assert pacer.limit == 2 * GROUPS
    for _ in range(30):
        pacer.observe(Flow(waited=0.5, elapsed=1.0, surplus=0))
    assert pacer.limit == budget.capacity


@given(
    groups=st.integers(1, 20),
    lag=st.integers(0, 5),
    window=st.floats(0, 0.9),
    flows=st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2), st.integers(-5, 200))),
)
@settings(max_examples=100, deadline=None)
def test_the_limit_stays_between_two_steps_and_the_budget(groups, lag, window, flows):
    budget = freshness_budget(groups, lag, window)
    pacer = Pacer(budget)
    for flow in flows:
        limit = pacer.observe(Flow(*flow))
        assert min(2 * groups, budget.capacity) <= limit <= budget.capacity
