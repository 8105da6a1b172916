"""A mesh that cannot divide the model is refused in one line, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.configs.errors import ConfigError
from paceline.configs.limits.parallel_limits import require_divisible
from paceline.configs.load import load_config
from paceline.controller.run.run import run_training

# the quick start's model: 2 layers, 4 heads of queries, 2 of keys, 384 features, 128 tokens


def overrides(num_ranks: int, **parallel: Any) -> list[str]:
    settings = [f"learner.parallel.{key}={value}" for key, value in parallel.items()]
    return [f"learner.num_ranks={num_ranks}", *settings]


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "expected"),
    [
        (3, {"tensor": 3}, r"tensor \(3\) does not divide the model's 4 attention heads"),
        (4, {"tensor": 4}, r"tensor \(4\) does not divide the model's 2 key-value heads"),
        (3, {"sequence": 3}, r"sequence \(3\) does not divide the 4 attention heads of a tensor"),
        (8, {"tensor": 2, "sequence": 4}, r"does not divide the 2 attention heads of a tensor"),
        (3, {"pipeline": 3}, r"3 pipeline stages .* 2 layers"),
        (
            2,
            {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2},
            r"4 pipeline stages \(2 ranks with 2 each\) for a model of 2 layers",
        ),
    ],
)
def test_what_does_not_divide_the_model_is_refused(num_ranks, parallel, expected):
    config = load_config("quickstart", overrides(num_ranks, **parallel))
    with pytest.raises(ConfigError, match=expected):
        require_divisible(config)


@pytest.mark.parametrize(
    ("model_type", "overrides", "expected"),
    [
        ("phi3", ["learner.parallel.tensor=2"], r"does not know phi3.*needs a plan in learner/"),
        ("mistral", ["learner.activation_checkpointing=chunks"], "not of mistral, which needs"),
        ("qwen3_moe", ["learner.parallel.pipeline=2"], "qwen3_moe has experts"),
        ("qwen3_moe", ["learner.engine=deepspeed"], "qwen3_moe has experts"),
        ("mistral", ["learner.parallel.pipeline=4"], r"4 pipeline stages .* 2 layers"),
        ("olmo2", ["learner.parallel.sequence=8"], "does not divide the 4 attention heads"),
    ],
)
def test_an_architecture_that_nobody_can_divide_so_is_named(
    tmp_path, model_type, overrides, expected
):
    """Given inline or as a folder; of neither are the parameters counted here."""
    overrides = ["learner.num_ranks=8", *overrides]
    inline = load_config("quickstart", [f"model.architecture.model_type={model_type}", *overrides])
    (tmp_path / "config.json").write_text(json.dumps(inline.model.architecture))
    of_path = ["model.architecture=null", f"model.path={tmp_path}", *overrides]
    for config in (inline, load_config("quickstart", of_path)):
        with pytest.raises(ConfigError, match=expected):
            require_divisible(config)


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (3, {}),
        (4, {"tensor": 2}),
        (4, {"sequence": 4}),
        (8, {"tensor": 2, "sequence": 2, "pipeline": 2}),
        (4, {"replicate": 2, "pipeline": 2}),
    ],
)
def test_what_divides_the_model_is_not(num_ranks, parallel):
    require_divisible(load_config("quickstart", overrides(num_ranks, **parallel)))


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "expected"),
    [
        (3, {"tensor": 2}, r"num_ranks \(3\) must be a multiple"),
        (2, {"tensor": 2, "pipeline": 2}, r"multiple of .* \(4\)"),
        (2, {"schedule": "interleaved"}, r"stages_per_rank"),
        (2, {"stages_per_rank": 2}, r"stages_per_rank"),
    ],
)
def test_a_mesh_that_does_not_divide_the_ranks_is_no_configuration(num_ranks, parallel, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config("quickstart", overrides(num_ranks, **parallel))


def test_deepspeed_divides_weights_and_samples_only():
    with pytest.raises(ConfigError, match="deepspeed divides weights and samples only"):
        load_config("quickstart", ["learner.engine=deepspeed", *overrides(2, tensor=2)])


def test_a_run_that_is_refused_leaves_nothing(tmp_path: Path):
    config = load_config("quickstart", [f"output_dir={tmp_path}", *overrides(3, pipeline=3)])
    with pytest.raises(ConfigError):
        run_training(config, resume=False)
    assert not list(tmp_path.iterdir())
