"""When what happens between two steps of training is due, and in which order it runs."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest

from paceline.configs.vocabulary import StepReport, TrainBatch, WeightVersion
from paceline.controller.groups.assembly import AssembledBatch
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from paceline.controller.parts import StepView
from paceline.controller.run.metering import RunTotals, StepMeter
from paceline.controller.run.phases import StepHook, TrainingObserver, WarmStartObserver
from tests.controller.builders import make_group

STEPS = 6


def view(finished):
    group = make_group(finished)
    batch = TrainBatch(finished - 1, (group.group_id,), ())
    assembled = AssembledBatch(batch, (group,), (group.group_id,), Counter())
    report = StepReport(WeightVersion(finished), 10, 4, 0, 0.1, {"loss": 1.0})
    return StepView(assembled, report, {"train": 0.1}, {}, 0, is_last=finished == STEPS)


class Recorder:
    """Keeps what it is told."""

    def __init__(self):
        self.records, self.messages = [], []
        self.step, self.message = self.records.append, self.messages.append
        self.samples = self.workers = lambda *_: None


class Pool:
    """Has no workers."""

    async def counters(self):
        return []

    def states(self):
        return {}


def follow(observer):
    """Finished steps between which something was done."""

    async def scenario():
        done = []
        for finished in range(1, STEPS + 1):
            step = view(finished)
            if await observer.after_step(step):
                done.append(finished)
                if await observer.between_steps(step):
                    break
        return done

    return asyncio.run(scenario())


def training(journal=None, **options):
    return TrainingObserver(
        recorder=Recorder(),
        meter=StepMeter("train", 0.0),
        totals=RunTotals(),
        pool=Pool(),
        journal=journal or Journal(MemoryStore()),
        samples_per_step=1,
        **options,
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"every": 2}, [2, 4]),
        ({"every": None}, []),
        ({"first": 2}, [1, 2]),
        ({"first": 9}, [*range(1, 7)]),
    ],
)
def test_a_hook_is_due_every_so_many_steps_but_the_last_or_for_the_first_ones(schedule, expected):
    ran = []

    async def hook(finished):
        ran.append(finished)

    assert follow(training(hooks=[StepHook(hook, **schedule)])) == expected
    assert ran == expected


def test_hooks_run_in_order_and_each_only_when_it_is_due():
    ran = []

    def hook(name):
        async def run(finished):
            ran.append((name, finished))

        return run

    hooks = [StepHook(hook("check"), first=2), StepHook(hook("save"), every=2)]
    assert follow(training(hooks=hooks)) == [1, 2, 4]
    assert ran == [("check", 1), ("check", 2), ("save", 2), ("save", 4)]


def test_every_step_is_recorded_with_the_metrics_of_those_who_see_it():
    observer = training(metrics=[lambda step: {"a": 1.0}, lambda step: {"b": float(step.finished)}])
    assert follow(observer) == []
    assert [record.metrics["b"] for record in observer.recorder.records] == [1, 2, 3, 4, 5, 6]
    assert all(record.metrics["a"] == 1.0 for record in observer.recorder.records)
    assert observer.totals.groups_trained == STEPS


def test_a_step_done_again_with_other_weights_is_told():
    journal = SimpleNamespace(state=SimpleNamespace(diverged=[2]))
    observer = training(journal=journal)
    follow(observer)
    (message,) = observer.recorder.messages
    assert message.startswith("step 3, done again, made other weights")


@pytest.mark.parametrize(("reached_at", "validated"), [(4, [2, 4]), (99, [2, 4, 6])])
def test_a_warm_start_ends_with_the_validation_that_reaches_its_target(reached_at, validated):
    async def validate(finished):
        return 1.0 if finished >= reached_at else 0.25

    observer = WarmStartObserver(Recorder(), StepMeter("warm_start", 0.0), validate, 2, 0.9)
    assert follow(observer) == validated
    assert observer.reached == (1.0 if reached_at < 99 else 0.25)
    assert observer.next_position == validated[-1] + 1
