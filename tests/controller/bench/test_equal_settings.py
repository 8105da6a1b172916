"""Both sides of the comparison are given the same settings, problems and batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.configs.schema import RunConfig
from paceline.controller.bench.e2e.algorithms import (
    CLIPPED,
    DECOUPLED,
    IN_STEP,
    TRUNCATED,
    UNCORRECTED,
    VARIANTS,
)
from paceline.controller.bench.e2e.e2e import (
    ASYNCHRONOUS,
    DEFAULTS,
    FULL,
    PACELINE_VARIANTS,
    SYNCHRONOUS,
)
from paceline.controller.bench.e2e.paceline_runs import resolve
from paceline.controller.bench.e2e.trl_job import Problem, TRLJob
from paceline.controller.bench.e2e.trl_runs import training_problems
from paceline.controller.bench.e2e.workload import LONG, SHORT, Workload

WORKLOADS = pytest.mark.parametrize("workload", [SHORT, LONG], ids=lambda w: w.name)


def config_of(workload: Workload, variant: str) -> RunConfig:
    return resolve(workload.training_overrides(10) | PACELINE_VARIANTS[variant])


@WORKLOADS
def test_the_peer_is_given_what_paceline_is_given(workload: Workload, tmp_path: Path) -> None:
    config = config_of(workload, SYNCHRONOUS)
    job = TRLJob.of(workload, tmp_path, [], config.loop.num_steps, tmp_path / "answer.json")

    optimizer = config.learner.optimizer
    assert job.num_steps == config.loop.num_steps
    assert job.groups_per_step == config.loop.groups_per_step
    assert job.samples_per_group == config.loop.samples_per_group
    assert job.max_tokens == config.rollout.sampling.max_tokens
    assert job.temperature == config.rollout.sampling.temperature
    assert job.learning_rate == optimizer.learning_rate
    assert job.adam_betas == optimizer.betas
    assert job.max_grad_norm == optimizer.max_grad_norm
    assert (job.clip_low, job.clip_high) == (
        config.algorithm.loss.clip_low,
        config.algorithm.loss.clip_high,
    )
    assert job.seed == config.seed
    # what the trainer's settings fix for the peer
    assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 0)
    assert (optimizer.weight_decay, optimizer.epsilon) == (0.0, 1e-8)
    assert config.model.precision == "float32"
    assert config.algorithm.advantage.normalize_std
    assert config.algorithm.aggregation == "token_mean"
    assert config.warm_start is None


@WORKLOADS
def test_equal_settings_means_that_nothing_is_dropped(workload: Workload) -> None:
    assert config_of(workload, SYNCHRONOUS).algorithm.zero_signal == "keep"
    assert config_of(workload, SYNCHRONOUS).loop.max_lag == 0
    assert config_of(workload, ASYNCHRONOUS).algorithm.zero_signal == "keep"
    assert config_of(workload, ASYNCHRONOUS).loop.max_lag == resolve({}).loop.max_lag > 0


def test_the_defaults_are_the_quick_starts() -> None:
    quick_start = resolve({})
    measured = config_of(SHORT, DEFAULTS)

    assert measured.loop.max_lag == quick_start.loop.max_lag
    assert measured.algorithm == quick_start.algorithm
    assert measured.rollout == quick_start.rollout
    assert measured.loop.groups_per_step == quick_start.loop.groups_per_step
    assert measured.data.source == quick_start.data.source


@WORKLOADS
def test_the_peer_trains_on_paceline_s_problems_with_its_rewarded_answers(
    workload: Workload,
) -> None:
    problems = training_problems(config_of(workload, SYNCHRONOUS), 64)

    assert len(problems) == 64
    assert all(problem.prompt.endswith("=") and problem.reference for problem in problems)
    if workload is SHORT:
        assert all(problem.reference == problem.prompt[-2::-1] for problem in problems)


@WORKLOADS
def test_every_problem_and_answer_fits_the_model(workload: Workload) -> None:
    for problem in training_problems(config_of(workload, SYNCHRONOUS), 2000):
        # one token a character, and the stop token
        assert len(problem.reference) + 1 <= workload.max_tokens
        assert len(problem.prompt) + workload.max_tokens <= workload.max_length


def test_micro_batches_of_the_peer_divide_its_step() -> None:
    for plan in FULL:
        job = TRLJob.of(plan.workload, Path(), [], 1, Path())
        assert plan.workload.samples_per_step % job.microbatch_size == 0


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    problems = [Problem("abc=", "cba")]
    job = TRLJob.of(SHORT, tmp_path, problems, 3, tmp_path / "answer.json")
    job.write(tmp_path / "job.json")

    assert TRLJob.read(tmp_path / "job.json") == job


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_algorithms_differ_in_lag_and_algorithm_alone(name: str) -> None:
    config = resolve(VARIANTS[name])
    assert config.loop.max_lag == (0 if name == IN_STEP else 4)
    assert config.algorithm.zero_signal == "keep"
    plain, varied = resolve({}).model_dump(), config.model_dump()
    for section in ("algorithm", "loop", "name"):
        plain.pop(section), varied.pop(section)
    varied["rollout"]["max_num_seqs"] = plain["rollout"]["max_num_seqs"]
    assert varied == plain


def test_only_the_uncorrected_variant_takes_old_samples_for_new_ones() -> None:
    algorithms = {name: resolve(VARIANTS[name]).algorithm for name in VARIANTS}
    assert algorithms[UNCORRECTED].loss.type == "reinforce"
    assert not algorithms[UNCORRECTED].corrections
    assert algorithms[CLIPPED] == algorithms[IN_STEP]
    assert algorithms[DECOUPLED].old_policy == "recomputed"
    assert [c.type for c in algorithms[TRUNCATED].corrections] == ["truncate"]
