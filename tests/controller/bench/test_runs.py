"""Whole runs under the stopwatches of ``bench e2e``, ``async`` and ``algorithms``."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from paceline.controller.bench.e2e import algorithms, asynchrony, e2e
from paceline.controller.bench.e2e.paceline_runs import train
from paceline.controller.bench.e2e.step_times import paceline_figures, peer_figures
from paceline.controller.bench.e2e.workload import SHORT
from paceline.controller.bench.harness.result import BenchError, Measured
from paceline.controller.observe.files.records import StepRecord

TINY = replace(SHORT, groups_per_step=4, samples_per_group=4)
OVERRIDES = {"evaluation.every_steps": "3", "evaluation.num_examples": "0"}
PLAN = asynchrony.Plan(TINY, ["lag 0"], 1, num_steps=3, num_warmup=1, is_warm=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[StepRecord]]:
    """A synchronous run of three steps, as all three benchmarks run them."""
    folder = tmp_path_factory.mktemp("runs")
    start = asynchrony.start_of(PLAN, folder) | OVERRIDES | {"loop.max_lag": "0"}
    return folder / "lag-0", train("lag-0", folder, start)


@pytest.mark.run
def test_the_parts_of_a_step_account_for_it_and_all_samples_are_counted(run) -> None:
    _, records = run
    figures = paceline_figures(records, 1, TINY.samples_per_group, overlapping=False)
    parts = [figures[name] for name in ("generate", "train", "sync", "other")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(figures["s/step"])
    assert figures["samples/s"] == figures["trained/s"]
    assert figures["samples/s"] * figures["s/step"] == pytest.approx(TINY.samples_per_step)
    assert 0 < figures["overhead"] < 1
    assert figures["padding"] >= 1


@pytest.mark.run
def test_ages_are_those_of_the_ledger_and_lag_zero_trains_no_old_group(run) -> None:
    folder, records = run
    ages = asynchrony.ages_of(folder)
    assert dict(ages) == {0: 3 * TINY.groups_per_step}
    figures = asynchrony.figures_of(PLAN, "lag 0", records, ages)
    assert figures["age 0"] == 1 and figures[asynchrony.BEYOND] == 0
    assert figures["engine idle"] == pytest.approx(1 - figures["generate"] / figures["s/step"])
    assert 0 < figures["learner idle"] < 1
    assert 1 <= figures["ideal ratio"] <= 2


@pytest.mark.run
def test_accuracies_are_those_of_the_runs_evaluations(run) -> None:
    figures = algorithms.figures_of(*run)
    accuracies = {name: value for name, value in figures.items() if name.startswith("step ")}
    assert list(accuracies)[-1] == "step 3"
    assert figures[algorithms.AT_THE_END] == accuracies["step 3"]
    assert all(0 <= accuracy <= 100 for accuracy in accuracies.values())
    assert figures["mean age"] == 0


def step(number: int, seconds: float = 1.0, num_trained: int = 512, dropped: int = 0) -> StepRecord:
    """A step that is half generating, three tenths training and a twentieth publishing."""
    parts = {"generate": 0.5, "train": 0.2, "optimizer": 0.1, "publish": 0.02, "sync": 0.03}
    return StepRecord(
        phase="train",
        step=number,
        seconds=float(number),
        samples_per_second=num_trained / seconds,
        metrics={"padding_fraction": 0.2},
        time={"step": seconds} | {name: share * seconds for name, share in parts.items()},
        dropped={"zero_signal": dropped},
    )


def test_figures_are_of_the_timed_window_all_samples_over_all_seconds() -> None:
    slow = [step(1, 60.0), step(2, 30.0)]
    timed = [step(3, 1.0), step(4, 3.0, dropped=20)]
    figures = paceline_figures(slow + timed, 2, 16, overlapping=False)
    assert figures == pytest.approx(
        {
            "samples/s": (2 * 512 + 20 * 16) / 4,
            "trained/s": 2 * 512 / 4,
            "s/step": 2.0,
            "generate": 1.0,
            "train": 0.6,
            "sync": 0.1,
            "other": 0.3,
            "padding": 1.25,
            "overhead": 0.2,
        }
    )
    overlapping = paceline_figures(timed, 0, 16, overlapping=True)
    assert overlapping["other"] is None and "overhead" not in overlapping
    with pytest.raises(BenchError, match="2 steps and 2 of them are warm-up"):
        paceline_figures(slow, 2, 16, overlapping=False)


def test_the_peers_figures_are_read_from_its_tallies() -> None:
    names = ("generate", "forward_backward", "optimizer", "real_tokens", "samples")
    warmup = dict.fromkeys(names, 9.0) | {"seconds": 50.0, "computed_tokens": 1e9}
    timed = dict(zip(names, (1.0, 1.0, 0.1, 100.0, 512.0), strict=True))
    figures = peer_figures([warmup, timed | {"seconds": 3.0, "computed_tokens": 300.0}], 1)
    assert (figures["s/step"], figures["padding"]) == (3.0, 3.0)
    assert figures["train"] == pytest.approx(1.1)
    assert figures["other"] == pytest.approx(0.9)
    assert figures["samples/s"] == figures["trained/s"] == pytest.approx(512 / 3)


def test_the_oldest_age_of_any_run_is_judged_and_each_lag_by_its_own_bound() -> None:
    records = [step(number) for number in (1, 2, 3)]
    plan = replace(PLAN, lags=["lag 0", "lag 2"])

    def judged(late: Counter[int]):
        ages = {"lag 0": Counter({0: 8}), "lag 2": late}
        found = {lag: asynchrony.figures_of(plan, lag, records, ages[lag]) for lag in plan.lags}
        _, beyond = asynchrony.targets_of("case", plan.lags)
        return beyond.judge(Measured({"case": [found]}))

    assert judged(Counter({1: 4, 2: 4})).met
    assert not judged(Counter({1: 7, 3: 1})).met


def test_rewards_are_compared_at_the_time_when_the_first_run_was_over() -> None:
    quick, slow = [(1.0, 0.25), (2.0, 0.75)], [(1.9, 0.5), (3.8, 1.0)]
    told = asynchrony.reward_note({"lag 0": [slow], "lag 2": [quick]})
    assert told.endswith("by 2 s of training: lag 0: 0.5; lag 2: 0.5.")


def test_quick_says_which_variants_it_leaves_out_and_asks_nothing_of_them() -> None:
    (quick,), full = e2e.QUICK, e2e.FULL[0]
    assert e2e.notes_of(quick)[1].endswith("with their targets: asynchronous, defaults")
    assert len(e2e.notes_of(full)) == 1
    asked, all_asked = (e2e.targets_of("short", plan.variants) for plan in (quick, full))
    assert [target.what.split(": ")[1] for target in asked] == [
        "synchronous over TRL, samples/s, equal settings",
        "overhead of a synchronous step",
    ]
    assert len(all_asked) == 4


def test_without_trl_there_is_one_clear_line(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"TRL, which is not installed: pip install"):
        e2e.bench_e2e(True, tmp_path)
