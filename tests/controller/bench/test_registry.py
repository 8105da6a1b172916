from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.configs.errors import ConfigError
from paceline.controller.bench.harness import registry
from paceline.controller.bench.harness.result import BenchResult, BenchTable, Spread, Target


def result_with(value: float) -> BenchResult:
    return BenchResult(
        bench="fake",
        targets={"speed": Target(Spread.of([value]), ">=", 3.0)},
        figures={"not_a_number": float("nan")},
        seeds={"run": 7},
        versions={"trl": "1.16.0"},
        tables=[BenchTable("figures", ("variant", "samples/s"), [("ours", "12")])],
        notes=["a note"],
    )


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, value: float) -> int:
    monkeypatch.setattr(registry, "BENCHES", {"fake": lambda quick, output: result_with(value)})
    return registry.run_bench("fake", True, folder / "bench")


def test_the_last_line_is_the_result_as_one_json_object(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path, 3.5)

    lines = capsys.readouterr().out.splitlines()
    answer = json.loads(lines[-1])
    assert answer["bench"] == "fake"
    assert answer["targets"]["speed"]["value"] == 3.5
    assert answer["targets"]["speed"]["target"] == 3.0
    assert answer["targets"]["speed"]["met"] is True
    assert answer["seeds"] == {"run": 7}
    assert answer["versions"] == {"trl": "1.16.0"}
    assert answer["figures"] == {"not_a_number": None}
    assert any("samples/s" in line for line in lines[:-1])
    assert "a note" in lines


def test_a_missed_target_shows_and_sets_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, 3.5) == 0
    assert run(monkeypatch, tmp_path, 2.5) == 1

    assert '"met": false' in capsys.readouterr().out.splitlines()[-1]


def test_an_unknown_benchmark_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no benchmark 'e2'; there are: e2e, .*; did you mean e2e\?"
    ):
        registry.run_bench("e2", False, tmp_path)


@pytest.mark.parametrize(
    ("value", "comparison", "met"),
    [
        (3.0, ">=", True),
        (2.9, ">=", False),
        (3.0, "<=", True),
        (3.1, "<=", False),
        (3.0, ">", False),
    ],
)
def test_a_target_is_met_by_its_comparison(value: float, comparison: str, met: bool) -> None:
    assert Target(Spread.of([value]), comparison, 3.0).met is met  # type: ignore[arg-type]


def test_a_target_is_judged_by_the_median_and_tells_the_range() -> None:
    target = Target(Spread.of([2.0, 9.0, 3.5]), ">=", 3.0)

    assert target.met
    assert target.as_dict()["value"] == 3.5
    assert target.as_dict()["range"] == [2.0, 9.0]


def test_spread_is_the_median_with_the_range() -> None:
    assert str(Spread.of([3.0, 1.0, 10.0])) == "3 (1-10)"
    assert str(Spread.of([2.5])) == "2.5"
