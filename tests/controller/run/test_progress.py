"""Where a run's time goes: every second counted once."""

import time

import pytest

from paceline.controller.run.progress import RunProgress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_a_part_within_a_part_counts_for_itself_alone(clock):
    progress = RunProgress(_since=clock())
    clock.now += 1
    with progress.spending("train"):
        clock.now += 2
        with progress.spending("evaluation"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    progress.settle()
    assert progress.seconds == {"startup": 17.0, "train": 10.0, "evaluation": 4.0}


def test_time_spent_until_an_error_is_counted(clock):
    progress = RunProgress(_since=clock())

    def fails():
        with progress.spending("train"):
            clock.now += 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert progress.seconds["train"] == 2.0


def test_settling_in_the_middle_counts_nothing_twice(clock):
    progress = RunProgress(_since=clock())
    with progress.spending("train"):
        clock.now += 2
        progress.settle()
        assert progress.seconds["train"] == 2.0
        clock.now += 3
    assert progress.seconds["train"] == 5.0


def test_the_clock_of_a_resumed_run_goes_on_where_the_interrupted_one_stood(clock):
    progress = RunProgress(seconds={"startup": 10.0, "train": 30.0}, _since=clock())
    clock.now += 5
    assert clock() - progress.began == 45.0
