"""The peer really runs, on what it is given, and its stopwatch accounts for what it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from paceline.controller.bench.e2e.trl_job import Problem, TRLJob
from paceline.controller.bench.e2e.workload import SHORT
from paceline.controller.bench.learner.batch import BRIEF

pytest.importorskip("trl")

TINY = replace(BRIEF, layers=1, vocabulary=160, num_groups=2, num_prompt=8, longest=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return TINY.write_model(tmp_path_factory.mktemp("peer") / "model")


@pytest.mark.slow
def test_a_step_of_the_peer_is_timed_part_by_part(model: Path, tmp_path: Path) -> None:
    from paceline.controller.bench.e2e.trl_trainer import run

    workload = replace(SHORT, groups_per_step=2, samples_per_group=4, peer_microbatch_size=4)
    problems = (Problem("abc=", "cba"), Problem("abcdefghij=", "jihgfedcba")) * 2
    steps = run(TRLJob.of(workload, model, problems, 2, tmp_path / "answer.json"))

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


@pytest.mark.slow
def test_the_peer_trains_on_what_it_is_handed(model: Path) -> None:
    from paceline.controller.bench.learner.peer import trl_steps

    assert len(trl_steps(TINY, model, 2, microbatch_size=8)) == 2
