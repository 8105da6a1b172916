"""What a step consumed, as numbers: totals that survive a checkpoint, rates, samples to look at."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from paceline.configs.vocabulary import StepReport, TrainBatch, WeightVersion
from paceline.controller.groups.assembly import AssembledBatch
from paceline.controller.groups.buffer import WorkBuffer
from paceline.controller.groups.freshness import freshness_budget
from paceline.controller.parts import StepView
from paceline.controller.run.metering import RunTotals, StepMeter, sample_records
from tests.controller.builders import make_group

LENGTH = 4  # tokens of a completion that `builders` makes
PROMPT = 3


def batch_of(*groups, step=0, dropped=()):
    ids = tuple(group.group_id for group in groups)
    return AssembledBatch(TrainBatch(step, ids, ()), groups, ids, Counter(dropped))


def report(num_trained=0, num_tokens=100, num_padding=0, **metrics):
    return StepReport(WeightVersion(1), num_tokens, num_trained, num_padding, 0.5, metrics)


def measure(meter, batch, *engines, report=report(), **seconds):  # noqa: B008
    buffer = WorkBuffer(freshness_budget(2, 1, 0.0))
    step = StepView(batch, report, seconds, buffer.occupancy(), buffer.num_bytes, is_last=False)
    return meter.measure(step, list(engines))


def test_totals_count_what_was_trained_and_what_was_dropped():
    totals = RunTotals()
    totals.add(batch_of(make_group(0), make_group(1, (0, 0, 1))), report(num_trained=20))
    totals.add(batch_of(make_group(2, version=1), step=3, dropped=["zero_signal"] * 2), report(8))
    assert totals == RunTotals(
        groups_trained=3,
        groups_dropped=Counter(zero_signal=2),
        prompt_tokens=PROMPT * (2 + 3 + 2),
        completion_tokens=LENGTH * (2 + 3 + 2),
        trained_tokens=28,
        max_age=2,
    )


def test_totals_go_on_after_a_checkpoint_as_if_there_had_been_none():
    totals = RunTotals()
    totals.add(batch_of(make_group(0), dropped=["zero_signal", "grader_error"]), report(8))
    restored = RunTotals.from_dict(json.loads(json.dumps(totals.as_dict())))
    assert restored == totals
    for each in (totals, restored):
        each.add(batch_of(make_group(1), step=1, dropped=["zero_signal"]), report(8))
    assert restored == totals
    assert restored.groups_dropped == Counter(zero_signal=2, grader_error=1)


def test_a_saved_total_is_a_copy():
    totals = RunTotals()
    saved = totals.as_dict()
    totals.add(batch_of(make_group(0), dropped=["zero_signal"]), report(8))
    assert saved == RunTotals().as_dict()


def test_a_step_record_holds_rewards_lengths_and_ages_of_its_batch():
    record = measure(
        StepMeter("train", 0.0),
        batch_of(make_group(0, (0, 1)), make_group(1, (1, 1), version=4), step=5),
    )
    assert record.step == 6
    assert record.reward == pytest.approx(0.75)
    assert record.reward_std == pytest.approx(0.75**0.5 / 2)
    assert (record.length_p50, record.length_p99) == (LENGTH, LENGTH)
    assert (record.age_mean, record.age_max) == (3.0, 5.0)


@pytest.mark.parametrize("phase", ["warm_start", "train"])
def test_demonstrations_have_neither_rewards_nor_ages(phase):
    demonstration = replace(
        make_group(0), trajectories=(replace(make_group(0).trajectories[0], versions=()),)
    )
    record = measure(StepMeter(phase, 0.0), batch_of(demonstration))
    assert (record.reward, record.reward_std) == (None, None)
    assert (record.age_mean, record.age_max) == (None, None)
    assert record.rollout_tokens_per_second is None


def test_engine_rates_are_differences_between_steps():
    meter = StepMeter("train", 0.0)
    first = measure(meter, batch_of(make_group(0)), {"num_tokens": 100.0, "busy_seconds": 1.0})
    second = measure(meter, batch_of(make_group(1)), {"num_tokens": 160.0, "busy_seconds": 1.5})
    assert first.time["generate"] == 0.0, "nothing is known of the time before"
    assert second.time["generate"] == pytest.approx(0.5)
    assert second.rollout_tokens_per_second * second.time["step"] == pytest.approx(60.0)


def test_a_replaced_worker_that_counts_from_zero_gives_no_negative_rate():
    meter = StepMeter("train", 0.0)
    meter.restart([{"num_tokens": 500.0, "busy_seconds": 9.0}])
    record = measure(meter, batch_of(make_group(0)), {"num_tokens": 10.0, "busy_seconds": 0.1})
    assert record.rollout_tokens_per_second == 0.0
    assert record.time["generate"] == 0.0


def test_what_engines_did_between_steps_belongs_to_no_step():
    meter = StepMeter("train", 0.0)
    meter.restart([{"num_tokens": 100.0, "busy_seconds": 1.0}])
    meter.restart([{"num_tokens": 900.0, "busy_seconds": 5.0}])  # after an evaluation
    record = measure(meter, batch_of(make_group(0)), {"num_tokens": 910.0, "busy_seconds": 5.25})
    assert record.time["generate"] == pytest.approx(0.25)


def test_padding_is_a_fraction_of_all_tokens_and_the_loss_has_its_own_place():
    record = measure(
        StepMeter("train", 0.0),
        batch_of(make_group(0)),
        report=report(num_tokens=90, num_padding=10, loss=0.25, entropy=2.0),
        train=3.0,
    )
    assert record.metrics == {
        "entropy": 2.0,
        "padding_fraction": pytest.approx(0.1),
        "buffer_megabytes": 0.0,
    }
    assert record.loss == 0.25
    assert record.learner_tokens_per_second == pytest.approx(30.0)


def test_samples_are_spread_over_the_batch_and_say_who_sampled_them():
    groups = [make_group(index, (0.5, 1.0), version=2) for index in range(9)]
    records = sample_records(batch_of(*groups, step=3), 3)
    assert [record.prompt for record in records] == ["0=", "4=", "8="]
    assert {(r.step, r.reward, r.versions, r.age) for r in records} == {(4, 0.5, (2,), 1)}


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (5, 2)])
def test_no_more_samples_than_asked_for_or_there(count, expected):
    assert len(sample_records(batch_of(make_group(0), make_group(1)), count)) == expected
