"""The arithmetic of `paceline bench async`: ratios within rounds, rewards at equal time, ages."""

from __future__ import annotations

import os

from paceline.controller.bench.e2e.asynchrony import QUICK, Measured, _result
from paceline.controller.bench.harness.result import Spread
from paceline.controller.bench.harness.subprocesses import side_by_side


def measured(lag, rate, ages, curve=((1.0, 0.1), (2.0, 0.5))):
    return Measured(
        samples_per_second=rate,
        learner_idle=0.2,
        engine_idle=0.1,
        generate=1.0,
        train=0.5,
        ages=ages,
        max_lag=lag,
        curve=curve,
    )


def result(*rounds):
    return _result(QUICK, rounds, Spread.of([1.5]))


def test_ratios_are_formed_within_their_round():
    slow = {0: measured(0, 100, {0: 8}), 2: measured(2, 200, {1: 8})}
    fast = {0: measured(0, 1000, {0: 8}), 2: measured(2, 1000, {1: 8})}
    target = result(slow, fast, fast).targets["lag 2, samples/s over synchronous"]
    assert (target.measured.median, target.measured.low, target.measured.high) == (1, 1, 2)
    assert not target.met


def test_an_age_above_the_bound_misses_the_target():
    within = {0: measured(0, 1, {0: 8}), 2: measured(2, 1, {1: 4, 2: 4})}
    beyond = {0: measured(0, 1, {0: 8}), 2: measured(2, 1, {1: 4, 3: 1})}
    assert result(within).targets["oldest age less the bound"].met
    assert not result(within, beyond).targets["oldest age less the bound"].met


def test_rewards_are_compared_at_the_time_when_the_first_run_was_over():
    quick = measured(2, 2, {0: 1}, curve=((1.0, 0.25), (2.0, 0.75)))
    slow = measured(0, 1, {0: 1}, curve=((1.9, 0.5), (3.8, 1.0)))
    figures = result({0: slow, 2: quick}).figures
    assert figures["equal_wall_seconds"] == 2.0
    rewards = {lag: run["reward_at_equal_time"] for lag, run in figures["runs"][0].items()}
    assert rewards == {0: 0.5, 2: 0.5}


def test_what_runs_side_by_side_runs_in_processes_of_its_own():
    processes = side_by_side([os.getpid] * 2)
    assert len({*processes, os.getpid()}) == 3
