from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.controller.bench.e2e import e2e, trl_runs
from paceline.controller.bench.e2e import report as e2e_report
from paceline.controller.bench.harness.result import BenchError
from paceline.controller.bench.harness.timing import Window


def window(samples_per_second: float) -> Window:
    return Window(
        num_steps=8,
        seconds=512 / samples_per_second,
        generate=0.1,
        train=0.1,
        sync=0.01,
        other=0.02,
        padding_factor=1.0,
        generated_per_second=samples_per_second,
        trained_per_second=samples_per_second,
    )


def a_round(
    trl: float, synchronous: float, asynchronous: float, defaults: float, overhead: float = 0.1
) -> e2e_report.Round:
    rates = {
        e2e_report.PEER: trl,
        e2e_report.SYNCHRONOUS: synchronous,
        e2e_report.ASYNCHRONOUS: asynchronous,
        e2e_report.DEFAULTS: defaults,
    }
    return e2e_report.Round({name: window(rate) for name, rate in rates.items()}, overhead)


def test_targets_are_medians_of_the_ratios_within_a_round() -> None:
    # The machine was half as fast in the second round: ratios do not see it.
    rounds = [a_round(100, 310, 400, 600), a_round(50, 155, 200, 300), a_round(100, 900, 400, 600)]

    targets = e2e_report.targets_of(rounds)

    values = [target.measured.median for target in targets.values()]
    assert values == pytest.approx([3.1, 6.0, 0.1, 400 / 310])
    assert all(target.met for target in targets.values())


@pytest.mark.parametrize(
    ("slower", "missed"),
    [
        (a_round(100, 290, 400, 600), "synchronous over TRL, samples/s, equal settings"),
        (a_round(100, 310, 400, 490), "defaults over TRL, generated samples/s"),
        (a_round(100, 310, 400, 600, overhead=0.16), "overhead of a synchronous step"),
        (a_round(100, 310, 310, 600), "asynchronous over synchronous, samples/s"),
    ],
)
def test_each_target_can_be_missed_alone(slower: e2e_report.Round, missed: str) -> None:
    targets = e2e_report.targets_of([slower])

    assert [what for what, target in targets.items() if not target.met] == [missed]


def test_the_report_holds_every_workload_and_every_round() -> None:
    measured = [(plan, [a_round(100, 310, 400, 600)] * 3) for plan in e2e.FULL]

    result = e2e_report.report(measured, load_before=0.5)
    answer = json.loads(result.as_json())

    assert result.all_met
    assert len(answer["targets"]) == 4 * len(e2e.FULL)
    for plan in e2e.FULL:
        figures = answer["figures"][plan.workload.name]
        assert len(figures["rounds"]) == 3
        assert figures["rounds"][0]["variants"]["TRL"]["generated_per_second"] == 100
        assert answer["seeds"][plan.workload.name] == plan.workload.seed
    assert answer["versions"]["trl"]
    assert answer["versions"]["packages"]["torch"]


def test_without_trl_there_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trl_runs.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(BenchError, match=r"TRL, which is not installed: pip install"):
        e2e.bench_e2e(True, tmp_path)
