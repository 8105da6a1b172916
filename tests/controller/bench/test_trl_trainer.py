"""The peer really runs, and its stopwatch accounts for what it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from paceline.configs.schema.model import ModelConfig
from paceline.controller.bench.e2e.paceline_runs import resolve
from paceline.controller.bench.e2e.trl_job import Problem
from paceline.controller.bench.e2e.trl_runs import train_trl
from paceline.controller.bench.e2e.workload import SHORT
from paceline.controller.data.tokenizer import load_tokenizer
from paceline.learner.model.model import write_initial_model

pytest.importorskip("trl")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config: ModelConfig = resolve({}).model
    tokenizer = load_tokenizer(config)
    folder = tmp_path / "model"
    write_initial_model(config, len(tokenizer), tokenizer.eos_token_id, 0, str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.mark.slow
def test_a_step_of_the_peer_is_timed_part_by_part(model: Path, tmp_path: Path) -> None:
    workload = replace(SHORT, groups_per_step=2, samples_per_group=4, peer_microbatch_size=4)
    problems = (Problem("abc=", "cba"), Problem("abcdefghij=", "jihgfedcba")) * 2

    steps = train_trl("trl", tmp_path, workload, model, problems, num_steps=2)

    assert len(steps) == 2
    for step in steps:
        assert step["samples"] == 8
        # both micro-batches are as wide as the longest prompt and the longest completion
        assert step["computed_tokens"] % 8 == 0
        assert 8 * (11 + 1) <= step["computed_tokens"] <= 8 * (11 + 16)
        assert 4 * (4 + 11) + 8 <= step["real_tokens"] <= step["computed_tokens"]
        parts = step["generate"] + step["forward_backward"] + step["optimizer"]
        assert min(step["generate"], step["forward_backward"], step["optimizer"]) > 0
        assert parts < step["seconds"]
