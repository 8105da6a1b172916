"""Named algorithms: what their presets say, what is laid over them, what is refused."""

from __future__ import annotations

import pytest

from paceline.configs.errors import ConfigError
from paceline.configs.load import dump_config, load_config
from paceline.configs.schema.algorithm import PRESETS, critic_of, reference_of
from paceline.controller.wiring.algorithms import build_algorithm
from paceline.learner.objective.advantages import GroupRelative
from paceline.learner.objective.losses.corrections import SecondMoment, Truncate
from paceline.learner.objective.losses.policy import Clip
from tests.learner.conftest import model_folder, random_batch  # noqa: F401
from tests.learner.ranks import OPTIMIZER, make_worker


def configured(*overrides):
    return load_config("debug", ("name=x", *overrides))


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"distillation"}))
def test_every_named_algorithm_moves_the_weights(name, model_folder, tmp_path):  # noqa: F811
    config = configured(f"algorithm.type={name}")
    worker = make_worker(model_folder, tmp_path / "weights", critic=critic_of(config.algorithm))
    _, objective = build_algorithm(config)
    metrics = worker.forward_backward(random_batch(), objective).metrics
    assert metrics["ess"] > 0
    assert worker.optimizer_step(OPTIMIZER, 0, 10)["grad_norm"] > 0


def test_what_is_written_is_laid_over_the_preset():
    config = configured("algorithm={type: dapo, loss: {clip_high: 0.4}}").algorithm
    assert config.loss.clip_low == 0.2
    assert config.loss.clip_high == 0.4
    assert config.aggregation == "token_mean"
    other = configured("algorithm={type: dapo, loss: {type: reinforce}}").algorithm
    assert other.loss.model_dump() == {"type": "reinforce"}


def test_parts_get_their_options():
    _, objective = build_algorithm(
        configured(
            "algorithm={type: decoupled_ppo, advantage: {normalize_std: false}, num_updates: 2,"
            " corrections: [{type: truncate, cap: 3}, {type: second_moment, threshold: 0.1}]}"
        )
    )
    assert objective.advantage == GroupRelative(normalize_std=False)
    assert objective.policy_loss == Clip(0.2, 0.2)
    assert objective.corrections == (Truncate(3.0),)
    assert objective.second_moment == SecondMoment(0.1)
    assert objective.passes == {"proximal"}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_resolved_configuration_loads_back_to_the_same(name, tmp_path):
    extra = ["teacher={path: somewhere}"] if name == "distillation" else []
    config = configured(f"algorithm.type={name}", *extra)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            "algorithm={type: grpo, corrections: [{type: truncate}]}",
            "truncate weighs tokens by their ratio to the behaviour policy, and so does the loss",
        ),
        ("algorithm={type: grpo, advantage: {type: gae}}", "algorithm.critic is missing"),
        ("algorithm={type: grpo, critic: {}}", "algorithm.critic is given"),
        (
            "algorithm={type: grpo, reference: {estimator: k1}}",
            "estimator k1 has no gradient in the loss",
        ),
        ("algorithm={type: distillation}", "teacher_gap needs a teacher: give its path"),
        ("algorithm={type: grppo}", "unknown type 'grppo'; give one of grpo, dr_grpo"),
        (
            "algorithm={type: grpo, corrections: [{type: truncat}]}",
            "algorithm.corrections.0: unknown type 'truncat'",
        ),
        (
            "algorithm={type: grpo, corrections: [{type: truncate, kap: 1}]}",
            "algorithm.corrections.0.kap: unknown key",
        ),
        ("algorithm={zero_signal: keep, type: rloo, loops: 3}", "algorithm.loops: unknown key"),
        (
            "algorithm={type: decoupled_ppo, corrections: [{type: second_moment}, "
            "{type: mask_mastered}, {type: second_moment, threshold: 1e-4}]}",
            "algorithm.corrections: second_moment is given 2 times; give each type once",
        ),
    ],
)
def test_contradictory_parts_are_refused_in_one_line(overrides, said):
    with pytest.raises(ConfigError) as error:
        configured(overrides)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_teacher_that_cannot_do_its_work_is_refused():
    teacher = "teacher={path: somewhere}"
    with pytest.raises(ConfigError, match="sft samples nothing; leave the teacher out"):
        configured("algorithm={type: sft}", teacher)
    with pytest.raises(ConfigError, match="set rollout.sampling.temperature to 1"):
        configured("algorithm={type: distillation}", teacher, "rollout.sampling.temperature=0.7")


def test_who_asks_for_a_reference_gets_one():
    given = configured("algorithm={type: sft}", "loop.samples_per_group=1")
    assert reference_of(given.algorithm) is None
    assert reference_of(configured("algorithm={type: grpo}").algorithm) is None
    pairs = configured("algorithm={type: dpo}", "loop.samples_per_group=2")
    assert reference_of(pairs.algorithm) is not None
    asked = configured("algorithm={type: grpo, reference: {coefficient: 0.1}}").algorithm
    assert reference_of(asked).coefficient == 0.1
