from __future__ import annotations

import pytest

from paceline.controller.bench.harness.result import BenchError
from paceline.controller.bench.harness.timing import (
    controller_overhead,
    paceline_window,
    peer_window,
)
from paceline.controller.observe.files.records import StepRecord

SAMPLES_PER_GROUP = 16


def step(
    number: int,
    seconds: float = 1.0,
    *,
    generate: float = 0.4,
    train: float = 0.3,
    optimizer: float = 0.1,
    publish: float = 0.02,
    sync: float = 0.03,
    num_trained: int = 512,
    dropped: int = 0,
    padding_fraction: float = 0.0,
) -> StepRecord:
    return StepRecord(
        phase="train",
        step=number,
        seconds=float(number),
        samples_per_second=num_trained / seconds,
        metrics={"padding_fraction": padding_fraction},
        time={
            "step": seconds,
            "generate": generate,
            "train": train,
            "optimizer": optimizer,
            "publish": publish,
            "sync": sync,
            "wait_for_batch": generate,
        },
        dropped={"zero_signal": dropped} if dropped else {},
    )


def window(records: list[StepRecord], num_warmup: int = 0, overlapping: bool = False):
    return paceline_window(records, num_warmup, SAMPLES_PER_GROUP, overlapping)


def test_the_parts_of_a_synchronous_step_and_the_rest_add_up_to_its_duration() -> None:
    measured = window([step(1), step(2, 2.0, generate=1.1)])

    assert measured.other is not None
    parts = measured.generate + measured.train + measured.sync + measured.other
    assert parts == pytest.approx(measured.seconds) == pytest.approx(1.5)
    assert measured.train == pytest.approx(0.4)
    assert measured.sync == pytest.approx(0.05)
    assert measured.generate == pytest.approx(0.75)


def test_parts_that_overlap_leave_no_rest_to_speak_of() -> None:
    assert window([step(1, 0.5)], overlapping=True).other is None


def test_warm_up_steps_are_left_out() -> None:
    slow = [step(1, 60.0), step(2, 30.0)]
    timed = [step(3), step(4)]

    assert window(slow + timed, num_warmup=2) == window(timed)


def test_throughput_is_all_samples_over_all_seconds_not_a_mean_of_rates() -> None:
    measured = window([step(1, 1.0), step(2, 3.0)])

    assert measured.trained_per_second == pytest.approx(2 * 512 / 4.0)


def test_samples_of_dropped_groups_count_as_generated_and_not_as_trained() -> None:
    measured = window([step(1, 2.0, num_trained=512, dropped=20)])

    assert measured.trained_per_second == pytest.approx(256)
    assert measured.generated_per_second == pytest.approx((512 + 20 * SAMPLES_PER_GROUP) / 2)


def test_padding_factor_is_computed_over_real_tokens() -> None:
    assert window([step(1, padding_fraction=0.2)]).padding_factor == pytest.approx(1.25)
    assert window([step(1, padding_fraction=0.0)]).padding_factor == 1.0


def test_overhead_is_the_share_in_which_nothing_computes() -> None:
    records = [step(1, 9.0), step(2, 1.0), step(3, 1.0, generate=0.5)]

    # busy 0.8 and 0.9 of two seconds
    assert controller_overhead(records, num_warmup=1) == pytest.approx(1 - 1.7 / 2)


def test_a_run_that_ended_in_its_warm_up_is_an_error() -> None:
    with pytest.raises(BenchError, match="2 steps and 2 of them are warm-up"):
        window([step(1), step(2)], num_warmup=2)


def test_the_peers_window_is_read_from_its_tallies() -> None:
    first = {
        "seconds": 50.0,
        "generate": 1.0,
        "forward_backward": 1.0,
        "optimizer": 0.1,
        "computed_tokens": 1e9,
        "real_tokens": 1.0,
        "samples": 512,
    }
    second = first | {"seconds": 3.0, "computed_tokens": 300.0, "real_tokens": 100.0}

    measured = peer_window([first, second], num_warmup=1)

    assert measured.seconds == 3.0
    assert measured.train == pytest.approx(1.1)
    assert measured.other == pytest.approx(0.9)
    assert measured.padding_factor == pytest.approx(3.0)
    assert measured.generated_per_second == measured.trained_per_second == pytest.approx(512 / 3)
