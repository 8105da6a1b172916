"""One run from its command to its report: what it leaves behind agrees with itself."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tensorboardX.proto.event_pb2 import Event

from paceline.configs.load import load_config
from paceline.controller.observe.files.jsonl import read_json, read_lines
from paceline.controller.run.checkpoints import CheckpointFolder
from tests.integration.commands import PATIENCE_SECONDS, run, run_in
from tests.integration.conftest import LEARNS_QUICKLY, train

pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)

NUM_STEPS, GROUPS_PER_STEP, SAMPLES_PER_GROUP, MAX_LAG = 12, 8, 16, 1


def test_it_ends_well_and_says_so(finished_run):
    summary = finished_run.run.summary
    assert finished_run.ended.code == 0, finished_run.ended.errors
    assert finished_run.ended.errors == ""
    assert (summary.status, summary.error, summary.steps) == ("finished", None, NUM_STEPS)
    assert finished_run.ended.output.rstrip().endswith("runs/finished/report.html")


def test_it_leaves_nothing_running_and_nothing_in_shared_memory(finished_run):
    assert finished_run.processes == []
    assert finished_run.shared_folders == []


def test_no_worker_of_ray_idles_beside_it(finished_run):
    assert sum(title.startswith("ray::RolloutWorker") for title in finished_run.at_work) == 1
    assert not any(title.startswith("ray::IDLE") for title in finished_run.at_work)


def test_every_step_is_recorded_once_and_in_order(finished_run):
    assert [record.step for record in finished_run.run.steps] == list(range(1, NUM_STEPS + 1))
    seconds = [record.seconds for record in finished_run.run.steps]
    assert seconds == sorted(seconds)


def test_nothing_older_than_the_lag_allows_was_trained_on(finished_run):
    ages = [record.age_max for record in finished_run.run.steps]
    assert max(ages) <= MAX_LAG
    assert finished_run.run.summary.max_age == max(ages)
    samples, _ = read_lines(finished_run.run.folder.samples)
    assert all(sample["age"] <= MAX_LAG for sample in samples)
    assert all(sample["step"] - 1 - min(sample["versions"]) <= MAX_LAG for sample in samples)


def test_every_step_trained_its_share_of_groups(finished_run):
    summary = finished_run.run.summary
    assert summary.groups["trained"] == GROUPS_PER_STEP * NUM_STEPS
    assert summary.groups["generated"] == summary.groups["trained"]
    samples, num_unreadable = read_lines(finished_run.run.folder.samples)
    assert num_unreadable == 0
    assert [sample["step"] for sample in samples] == [
        step for step in range(1, NUM_STEPS + 1) for _ in range(2)
    ]


def test_tokens_are_counted_once(finished_run):
    tokens = finished_run.run.summary.tokens
    num_samples = GROUPS_PER_STEP * NUM_STEPS * SAMPLES_PER_GROUP
    assert tokens["trained"] == tokens["completion"]
    assert num_samples <= tokens["completion"] <= 16 * num_samples
    # A word of 3 to 10 letters and "=".
    assert 4 * num_samples <= tokens["prompt"] <= 11 * num_samples


def test_the_summary_has_the_accuracies_that_were_measured(finished_run):
    run, summary = finished_run.run, finished_run.run.summary
    before, after = run.evaluations["before"], run.evaluations["after"]
    assert (before.step, after.step) == (0, NUM_STEPS)
    assert (summary.greedy_before, summary.sampled_before) == (before.greedy, before.sampled)
    assert (summary.greedy_after, summary.sampled_after) == (after.greedy, after.sampled)
    examples = read_json(run.folder.examples)
    assert len(examples) == 12
    assert all(set(example["before"]) == {"text", "reward"} for example in examples)


def test_the_time_of_its_parts_is_the_time_it_took(finished_run):
    wall = dict(finished_run.run.summary.wall_seconds)
    total = wall.pop("total")
    assert sum(wall.values()) == pytest.approx(total, abs=0.05)
    assert set(wall) == {"startup", "train", "evaluation", "other"}
    assert finished_run.run.steps[-1].seconds < total < finished_run.seconds


def test_the_engines_were_checked_against_the_learner_after_each_of_the_first_updates(finished_run):
    checked = re.findall(r"self-check of version (\d+): (\d+) greedy tokens", finished_run.run.log)
    assert [int(version) for version, _ in checked] == [1, 2]
    assert all(int(num_tokens) >= 8 for _, num_tokens in checked)


def test_the_saved_configuration_is_the_one_that_ran(finished_run):
    folder = finished_run.run.folder
    config = load_config(str(folder.config), ())
    assert config.name == "finished"
    assert config.loop.num_steps == NUM_STEPS
    assert config.learner.optimizer.learning_rate == 1e-2
    assert config.model_dump(mode="json") == yaml.safe_load(folder.config.read_text())


def test_versions_name_what_it_ran_on_and_how_it_was_started(finished_run):
    versions = read_json(finished_run.run.folder.versions)
    assert {"paceline", "torch", "ray", "transformers"} <= set(versions["packages"])
    assert versions["command"].startswith("paceline train debug name=finished")
    assert finished_run.run.summary.versions == versions


def test_tensorboard_files_hold_the_curve_of_the_records(finished_run):
    (file,) = (finished_run.run.folder.tensorboard / "train").iterdir()
    curve = {
        event.step: value.simple_value
        for event in events_in(file)
        for value in event.summary.value
        if value.tag == "reward"
    }
    expected = {record.step: record.reward for record in finished_run.run.steps}
    assert curve == pytest.approx(expected, rel=1e-6)


def events_in(file: Path) -> Iterator[Event]:
    """Records of an event file: a length, its checksum, the event, its checksum."""
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack_from("<Q", content)
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_the_report_shows_the_run(finished_run):
    report = finished_run.run.folder.report.read_text()
    summary = finished_run.run.summary
    assert "finished" in report
    assert f"{summary.greedy_after:.1%}" in report
    assert f"{summary.sampled_after:.1%}" in report


def test_the_newest_checkpoints_are_kept(finished_run):
    folder = finished_run.run.folder.checkpoints
    assert sorted(path.name for path in folder.iterdir()) == ["step-000010", "step-000012"]
    state, _ = CheckpointFolder(folder, keep=2).latest()
    assert state.step == NUM_STEPS
    assert state.totals["groups_trained"] == GROUPS_PER_STEP * NUM_STEPS


def test_the_final_model_is_the_last_checkpoints_and_not_the_initial_one(finished_run):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = finished_run.run
    final = AutoModelForCausalLM.from_pretrained(run.folder.final).state_dict()
    initial = AutoModelForCausalLM.from_pretrained(run.folder.root / "initial").state_dict()
    assert set(final) == set(initial)
    assert any(not torch.equal(final[name], initial[name]) for name in final)
    tokenizer = AutoTokenizer.from_pretrained(run.folder.final)
    assert tokenizer.decode(tokenizer.encode("abc=")) == "abc="


def test_a_saved_model_is_as_good_as_the_run_said(finished_run):
    model = finished_run.run.folder.final
    ended = run("eval", "debug", "--model", str(model), cwd=finished_run.root)
    assert ended.code == 0, ended.errors
    found = dict(re.findall(r"held-out (\S+) +([\d.]+%)", ended.output))
    summary = finished_run.run.summary
    assert found == {
        "greedy": f"{summary.greedy_after:.1%}",
        "T=1": f"{summary.sampled_after:.1%}",
    }


def test_a_report_can_be_written_anew(finished_run):
    folder = finished_run.run.folder
    before = folder.report.read_text()
    folder.report.unlink()
    ended = run("report", "runs/finished", cwd=finished_run.root)
    assert ended.code == 0, ended.errors
    assert folder.report.read_text() == before


def test_metrics_are_plain_json_lines(finished_run):
    lines = finished_run.run.folder.metrics.read_text().splitlines()
    assert len(lines) == NUM_STEPS + 2
    for line in lines:
        json.loads(line, parse_constant=pytest.fail)


def test_a_student_comes_closer_to_its_teacher(tmp_path, finished_run):
    """The teacher is another run's model; the ledger balances with its scores in it."""
    teacher = finished_run.run.folder.final
    arguments = train(
        "taught",
        "loop.num_steps=12",
        "seed=7",
        "algorithm={type: distillation}",
        f"teacher={{path: '{teacher}', kv_cache_mb: 16}}",
        *LEARNS_QUICKLY,
    )
    ended = run(*arguments, cwd=tmp_path)
    assert (ended.code, ended.errors) == (0, "")
    run_folder = run_in(tmp_path, "taught")
    gaps = [step.metrics["teacher_reverse_kl"] for step in run_folder.steps]
    assert gaps[-1] < 0.5 * gaps[0]
    assert run("ledger", str(run_folder.folder.root), cwd=tmp_path).code == 0
