"""What a user can get wrong: one line that says what to do, exit code 2, the run folder intact."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.summary import RunSummary
from tests.integration.commands import PATIENCE_SECONDS, Ended, run
from tests.integration.conftest import train

pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)

EXACT = "reward={type: exact}"

GRADERS = """
import time

class Raising:
    def grade(self, prompt, completions):
        raise KeyError("no such answer")

class Hanging:
    def grade(self, prompt, completions):
        time.sleep(3600)
"""


def assert_one_line(ended: Ended, *parts: str) -> None:
    assert ended.code == 2, ended.errors
    assert ended.errors.count("\n") == 1, ended.errors
    assert ended.errors.startswith("paceline: ")
    assert "Traceback" not in ended.output
    for part in parts:
        assert part in ended.errors, ended.errors


def assert_failed_intact(root: Path, name: str, ended: Ended) -> None:
    """The folder has its configuration, the cause in summary and log, and a report of it."""
    folder = RunFolder.open(root / "runs" / name)
    summary = RunSummary.read(folder)
    assert summary.status == "failed"
    assert ended.errors == f"paceline: {summary.error}\n"
    assert f"failed: {summary.error}" in folder.log.read_text()
    assert "failed" in folder.report.read_text()
    assert json.loads(folder.versions.read_text())["command"].startswith("paceline train")


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: a\n  seed: [1\n", ["recipe.yaml:2"]),
        ("just some words", ["recipe.yaml"]),
        ("extends: nowhere.yaml", ["nowhere.yaml"]),
    ],
    ids=["no-yaml", "no-mapping", "extends-nothing"],
)
def test_an_unreadable_recipe(tmp_path, text, parts):
    (tmp_path / "recipe.yaml").write_text(text)
    assert_one_line(run("train", "recipe.yaml", cwd=tmp_path), *parts)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("loop.num_stepz=3", ["loop.num_stepz", "did you mean num_steps"]),
        ("loop.max_lag=soon", ["loop.max_lag", "integer", "'soon'"]),
        ("rollout.sampling.max_tokens=32", ["rollout.sampling.max_tokens", "model.max_length"]),
        ("model={architecture: null, path: ./weights}", ["./weights", "Hugging Face format"]),
    ],
    ids=["unknown-key", "wrong-type", "contradiction", "no-model"],
)
def test_a_setting_that_cannot_be(tmp_path, override, parts):
    assert_one_line(run(*train("bad", override), cwd=tmp_path), *parts)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_is_not_there(tmp_path):
    assert_one_line(run("train", "quikstart", cwd=tmp_path), "quikstart", "quickstart")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.tokenizer=./tokenizer"], ["./tokenizer", "tokenizer.json"]),
        (
            ["data.source={type: dataset, path: ./problems.jsonl}", EXACT],
            ["data.source.path", "./problems.jsonl", "no such file"],
        ),
        (["model.max_length=20"], ["tokens", "model.max_length", "rollout.sampling.max_tokens"]),
        (["cluster.address=127.0.0.1:{port}"], ["127.0.0.1:", "ray start --head"]),
    ],
    ids=[
        "broken-tokenizer",
        "no-dataset",
        "prompt-too-long",
        "no-cluster",
    ],
)
def test_a_run_that_cannot_start(tmp_path, overrides, parts):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{ this is not JSON")
    overrides = [each.replace("{port}", str(unused_port())) for each in overrides]
    ended = run(*train("bad", *overrides), cwd=tmp_path)
    assert_one_line(ended, *parts)
    assert_failed_intact(tmp_path, "bad", ended)


def test_a_run_folder_that_is_in_use_stays_as_it_is(tmp_path):
    used = tmp_path / "runs" / "mine"
    used.mkdir(parents=True)
    (used / "metrics.jsonl").write_text("precious\n")
    ended = run(*train("mine"), cwd=tmp_path)
    assert_one_line(ended, "runs/mine", "--resume")
    assert [path.name for path in used.iterdir()] == ["metrics.jsonl"]
    assert (used / "metrics.jsonl").read_text() == "precious\n"


def test_resuming_what_is_not_there(tmp_path):
    ended = run(*train("nothing"), "--resume", cwd=tmp_path)
    assert_one_line(ended, "runs/nothing", "check its name and output_dir")
    assert not (tmp_path / "runs").exists()


def test_evaluating_what_is_not_there(tmp_path):
    ended = run("eval", "debug", "--model", "final", cwd=tmp_path)
    assert_one_line(ended, "final", "Hugging Face format")


def test_reporting_what_is_not_there(tmp_path):
    assert_one_line(run("report", "runs/nothing", cwd=tmp_path), "runs/nothing")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["reward={type: import, import_path: 'graders:Raising'}"],
            ["grader", "KeyError", "no such answer"],
        ),
        (
            ["reward={type: import, import_path: 'graders:Hanging', time_limit_seconds: 1}"],
            ["longer than 1 seconds", "reward.time_limit_seconds"],
        ),
        (["model.architecture.head_dim=16"], ["head_dim", "16", "32"]),
    ],
    ids=["grader-raises", "grader-hangs", "head-size"],
)
def test_a_run_that_breaks_where_its_processes_are(tmp_path, overrides, parts):
    (tmp_path / "graders.py").write_text(GRADERS)
    ended = run(*train("bad", *overrides), cwd=tmp_path)
    assert_one_line(ended, *parts)
    assert_failed_intact(tmp_path, "bad", ended)
