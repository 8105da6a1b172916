"""Versions are forgotten once the policy has gone too far, by what the learner measures of it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.errors import ConfigError
from paceline.configs.vocabulary import StepReport, TrainBatch, VersionSpan, WeightVersion
from paceline.controller.drafts.drift import DriftWindow, PolicyDrift, mean_square_age
from paceline.controller.groups.assembly import AssembledBatch
from tests.controller.builders import make_group


def gaussian_kl(a: float, b: float) -> float:
    """Between normal distributions of variance 1: here the law of small steps is exact."""
    return (a - b) ** 2 / 2


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(1, 3), st.floats(0.01, 3))
def test_no_version_is_kept_that_is_too_far_where_every_step_is_measured(
    steps: list[float], age: int, max_nats: float
) -> None:
    """Each step measured by its own distance; ages only scale that."""
    drift, positions = PolicyDrift(max_nats), [0.0]
    for step in steps:
        positions.append(positions[-1] + step)
        drift.observe(gaussian_kl(0, age * step), age**2)
    for version in range(drift.oldest_near(), len(positions)):
        assert gaussian_kl(positions[version], positions[-1]) <= max_nats * (1 + 1e-9)


def test_on_a_straight_way_exactly_the_versions_within_reach_are_kept() -> None:
    drift = PolicyDrift(max_nats=0.5 * 3.5**2)
    for _ in range(10):
        drift.observe(kl=gaussian_kl(0, 2), mean_square_age=4)
    assert drift.distances == [1.0] * 10
    assert drift.oldest_near() == 10 - 3


def test_a_step_that_measures_nothing_counts_as_the_one_before() -> None:
    drift = PolicyDrift(1.0)
    drift.observe(0.5, 0.0)
    drift.observe(0.5, 1.0)
    drift.observe(0.0, 0.0)
    drift.observe(math.nan, 1.0)
    drift.observe(-1e-9, 1.0)  # as an estimate may come out
    assert drift.distances == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_a_run_that_goes_on_knows_how_far_it_has_come() -> None:
    whole, first = PolicyDrift(2.0), PolicyDrift(2.0)
    for step in range(12):
        whole.observe(step / 10, 1.0)
    for step in range(7):
        first.observe(step / 10, 1.0)
    second = PolicyDrift(2.0)
    second.resume(7, first.distances)
    for step in range(7, 12):
        second.observe(step / 10, 1.0)
    assert second.oldest_near() == whole.oldest_near() > 0


def batch_of(step: int, version: int) -> AssembledBatch:
    return AssembledBatch(TrainBatch(step, (make_group(0, version=version),)), (0,), Counter())


def report(**metrics: float) -> StepReport:
    return StepReport(WeightVersion(0), 1, 1, 0, 0.1, metrics)


def test_versions_are_forgotten_once_and_those_near_are_counted() -> None:
    forgotten: list[int] = []
    window = DriftWindow(PolicyDrift(2.0), forgotten.append)
    found = [
        window.observe(batch_of(step, step - 1), report(kl=0.5))["draft_versions_near"]
        for step in range(1, 6)
    ]
    assert forgotten == [1, 2, 3]
    assert found == [2, 3, 3, 3, 3]


def test_an_algorithm_that_does_not_say_how_far_it_went_is_named() -> None:
    window = DriftWindow(PolicyDrift(2.0), lambda before: None)
    with pytest.raises(ConfigError, match="reports loss, reward: set max_drift to null"):
        window.observe(batch_of(1, 0), report(loss=0.0, reward=1.0))


def test_ages_are_those_of_tokens() -> None:
    group = make_group(0)
    (sample, _) = group.samples
    spans = (VersionSpan(WeightVersion(2), 0, 3), VersionSpan(WeightVersion(4), 3, 4))
    completion = replace(sample.completion, versions=spans)
    group = replace(group, samples=(replace(sample, completion=completion),))
    found = mean_square_age([group], WeightVersion(4))
    assert found == np.mean([2**2, 2**2, 2**2, 0])
    assert mean_square_age([], WeightVersion(4)) == 0


def test_steps_that_were_not_measured_count_as_none() -> None:
    drift = PolicyDrift(2.0)
    drift.resume(3, ())
    assert drift.oldest_near() == 0
    drift.resume(3, [9.0])
    assert drift.oldest_near() == 3
