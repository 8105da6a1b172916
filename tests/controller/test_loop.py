"""The loop's laws, driven by fakes with arbitrary delays: order, freshness, exactly once, ends."""

import asyncio
import itertools
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.configs.vocabulary import StepReport, TrainBatch, WeightVersion
from paceline.controller.groups.assembly import Collector
from paceline.controller.groups.buffer import WorkBuffer, WorkerLost
from paceline.controller.groups.freshness import freshness_budget
from paceline.controller.groups.pacing import Pacer
from paceline.controller.groups.signal_filter import SignalFilter
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from paceline.controller.loop import Loop
from paceline.weights_sync.handle import WeightHandle
from paceline.weights_sync.layout import Layout
from tests.controller.builders import make_group, make_prompt


class World:
    """Fakes of every part around one shared truth: which version learner and engines hold."""

    def __init__(self, seed, *, deaths=0.0, dropped=0.0):
        self.random = random.Random(seed)
        self.deaths, self.dropped = deaths, dropped
        self.learner_version = 0
        self.served_version = 0
        self.published = []
        self.trained = []
        self.ages = []
        self.events = []

    async def pause(self):
        for _ in range(self.random.randrange(6)):
            await asyncio.sleep(0)

    async def generate(self, work):
        version = self.served_version
        await self.pause()
        if self.random.random() < self.deaths:
            raise WorkerLost
        rewards = (1.0, 1.0) if self.random.random() < self.dropped else (0.0, 1.0)
        return make_group(work.group_id, rewards, version)

    async def forward_backward(self, batch, algorithm):
        await self.pause()
        assert batch.step == self.learner_version
        self.trained.append(batch.group_ids)
        return Update(self, batch)

    async def apply(self, batch):
        await self.pause()
        assert self.served_version == self.learner_version, "version left the learner too late"
        self.learner_version = batch.step + 1
        return StepReport(WeightVersion(self.learner_version), 1, 1, 0, 0.0, {})

    async def publish(self, version):
        await self.pause()
        assert version == self.learner_version
        return WeightHandle(WeightVersion(version), "", 0, Layout(()))

    async def push(self, handle):
        await self.pause()
        assert handle.version == self.served_version + 1
        self.served_version = handle.version

    async def after_step(self, step):
        self.ages += step.batch.ages
        await self.pause()
        return False

    async def between_steps(self, step):
        assert self.served_version == step.finished, "the engines serve what was just made"
        await self.pause()
        return False


@dataclass
class Update:
    """Gradients of a batch, which its world applies."""

    world: World
    batch: TrainBatch

    async def apply(self):
        return await self.world.apply(self.batch)


def build_loop(world, *, groups=2, lag=1, window=0.0, steps=6, first_step=0, max_draws=1000):
    budget = freshness_budget(groups, lag, window)
    journal = Journal(MemoryStore())
    journal.begin(first_step)
    buffer = WorkBuffer(budget, journal)
    prompts = ((position, make_prompt(position)) for position in itertools.count())
    return Loop(
        prompts=prompts,
        generate=world.generate,
        collector=Collector(buffer, journal, SignalFilter(max_draws=max_draws), groups),
        algorithm=None,
        learner=world,
        weights=world,
        observer=world,
        budget=budget,
        buffer=buffer,
        journal=journal,
        pace=Pacer(budget),
        num_steps=steps,
        first_step=first_step,
    )


def run(loop):
    asyncio.run(asyncio.wait_for(loop.run(), 20))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 4),
    lag=st.integers(0, 3),
    window=st.sampled_from([0.0, 0.3, 0.7]),
    deaths=st.sampled_from([0.0, 0.3]),
    dropped=st.sampled_from([0.0, 0.5]),
    max_draws=st.sampled_from([2, 1000]),
)
def test_whatever_the_timing_nothing_is_too_old_lost_or_trained_twice(
    seed, groups, lag, window, deaths, dropped, max_draws
):
    world = World(seed, deaths=deaths, dropped=dropped)
    loop = build_loop(world, groups=groups, lag=lag, window=window, max_draws=max_draws)
    run(loop)
    trained = [group for batch in world.trained for group in batch]
    assert loop.steps_done == 6 or loop.exhausted
    assert max_draws == 2 or all(len(batch) == groups for batch in world.trained)
    assert len(trained) == len(set(trained))
    assert max(world.ages, default=0) <= lag
    assert world.served_version == world.learner_version == loop.steps_done


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_without_lag_every_group_is_sampled_by_the_version_it_trains(seed):
    world = World(seed)
    run(build_loop(world, lag=0))
    assert set(world.ages) == {0}


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_without_a_window_groups_are_trained_in_the_order_of_admission(seed):
    world = World(seed)
    run(build_loop(world, lag=2))
    trained = [group for batch in world.trained for group in batch]
    assert trained == list(range(len(trained)))


def test_lag_is_used_when_rollouts_are_faster_than_the_learner():
    world = World(0)
    run(build_loop(world, lag=2, steps=20))
    assert max(world.ages) == 2


@pytest.mark.parametrize(
    "part", ["generate", "forward_backward", "apply", "push", "publish", "after_step"]
)
def test_a_crash_in_any_part_ends_the_loop_with_its_cause(part):
    world = World(1)

    async def broken(*_):
        raise ZeroDivisionError(part)

    setattr(world, part, broken)
    with pytest.raises(ZeroDivisionError, match=part):
        run(build_loop(world))


def test_no_task_outlives_the_loop():
    async def scenario():
        await build_loop(World(2)).run()
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(scenario()) == set()


def test_a_stop_ends_after_the_step_and_leaves_its_slots_free():
    world = World(3)
    loop = build_loop(world, steps=1000)

    async def stop_at_third(step):
        if step.finished == 3:
            loop.stop.set()
        return False

    world.after_step = stop_at_third
    run(loop)
    assert loop.steps_done == 3
    trained = {group for batch in world.trained for group in batch}
    assert trained.isdisjoint(loop.buffer.unreleased())


def test_what_is_due_between_two_steps_meets_settled_weights_and_free_slots_and_can_end_the_loop():
    world = World(6)
    loop = build_loop(world, steps=9)
    finished, views = [], []

    async def after_step(step):
        views.append(step)
        return step.finished % 2 == 0

    async def between_steps(step):
        assert world.served_version == step.finished
        assert set(step.batch.slots).isdisjoint(loop.buffer.unreleased())
        finished.append(step.finished)
        return step.finished == 6

    world.after_step, world.between_steps = after_step, between_steps
    run(loop)
    assert finished == [2, 4, 6]
    assert [view.finished for view in views] == [1, 2, 3, 4, 5, 6]
    assert all(view.seconds.keys() >= {"train", "optimizer", "publish"} for view in views)
    assert not any(view.is_last for view in views)


def test_the_last_step_says_so():
    world, views = World(7), []

    async def after_step(step):
        views.append(step.is_last)
        return False

    world.after_step = after_step
    run(build_loop(world, steps=3))
    assert views == [False, False, True]


def test_a_run_out_of_signal_ends_in_order_and_says_so():
    world = World(4, dropped=1.0)
    loop = build_loop(world, max_draws=3)
    run(loop)
    assert loop.steps_done == 0
    assert loop.exhausted is not None
    assert loop.exhausted.mean_reward == 1.0


def test_a_resumed_loop_goes_on_at_its_step():
    world = World(5)
    world.learner_version = world.served_version = 4
    loop = build_loop(world, first_step=4, steps=6)
    run(loop)
    assert loop.steps_done == 2
    assert world.learner_version == 6
