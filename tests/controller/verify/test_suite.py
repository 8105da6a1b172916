"""The answer of ``paceline verify``: a table, what is wrong, one JSON line, and the exit status."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from paceline.configs.errors import ConfigError, ModelError
from paceline.controller.verify import speculation, suite
from paceline.controller.verify.checks.distribution import SUSPICIOUS, ChiSquare
from paceline.controller.verify.result import CheckResult, Verification

RIGHT = CheckResult("greedy tokens", "ours", "texts", 10, 8, 6, [ChiSquare("T=1", 9.0, 15, 0.8)])
WIDE = replace(
    RIGHT,
    check="stops and budgets",
    drafter="least likely.",
    num_tokens=123_456,
    num_drafted=123_456,
    num_accepted=123_455,
    comparisons=[ChiSquare("T=1", 30.0, 15, 0.008)],
    logprob_error=1e-6,
)
WRONG = CheckResult("stops", "ours", "texts", 10, faults=["3 of 4 samples end elsewhere"])


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verification quiets vLLM for its process; here the process goes on."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")


def run(monkeypatch: pytest.MonkeyPatch, *results: CheckResult) -> int:
    def verify(model: Path | None, **settings: object) -> Verification:
        return Verification("speculation", results, {"seed": settings["seed"]})

    monkeypatch.setattr(speculation, "verify_speculation", verify)
    return suite.run_verification("speculation", model=None, seed=3, quick=True)


def test_the_last_line_is_all_results_as_one_json_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, RIGHT) == 0
    lines = capsys.readouterr().out.splitlines()
    answer = json.loads(lines[-1])
    assert answer["passed"] is True
    assert answer["figures"] == {"seed": 3}
    assert answer["false_alarms"] == SUSPICIOUS
    (result,) = answer["results"]
    assert (result["num_drafted"], result["num_accepted"], result["passed"]) == (8, 6, True)
    assert result["comparisons"][0]["probability"] == 0.8
    assert any("greedy tokens" in line and "0.8" in line for line in lines[:-1])


def test_the_table_fits_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run(monkeypatch, WIDE)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "least likely" in line[:40])
    assert row.split() == [
        *("stops", "and", "budgets", "least", "likely."),
        *("123,456", "123,456", "123,455", "0.008", "1e-06", "ok"),
    ]


def test_one_check_that_fails_fails_the_run_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, RIGHT, WRONG) == 1
    said = capsys.readouterr().out
    assert "stops, drafted by ours: 3 of 4 samples end elsewhere" in said
    assert '"passed": false' in said.splitlines()[-1]


def test_no_check_at_all_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch) == 1


def test_an_unknown_verification_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="there are: speculation; did you mean speculation?"):
        suite.run_verification("speculations", model=None, seed=0, quick=True)


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no readable config\.json"):
        suite.run_verification("speculation", model=tmp_path, seed=0, quick=True)
