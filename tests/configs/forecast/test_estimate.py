from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from paceline.configs.forecast.estimate import estimate
from paceline.configs.forecast.model_shape import model_shape
from paceline.configs.load import load_config
from paceline.configs.schema import RunConfig
from paceline.configs.schema.model import ModelConfig

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
ARCHITECTURES: list[dict[str, Any]] = [
    {"model_type": "qwen3"} | SMALL,
    {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 96}
    | SMALL,
    {"model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": True} | SMALL,
    {"model_type": "qwen2", "intermediate_size": 80} | SMALL,
    {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True} | SMALL,
    {"model_type": "llama"} | SMALL,
    {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 16} | SMALL,
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True} | SMALL,
    {"model_type": "llama"},
    {"model_type": "qwen2"},
    {"model_type": "qwen3"},
    {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 40} | SMALL,
    {"model_type": "qwen3_moe", "num_experts": 3, "decoder_sparse_step": 2, "head_dim": 8} | SMALL,
    {"model_type": "qwen3_moe", "num_experts": 3, "mlp_only_layers": [0, 2]} | SMALL,
    {"model_type": "qwen3_moe", "num_experts": 3, "mlp_only_layers": [0, 1, 2]} | SMALL,
    {"model_type": "qwen3_moe"},
]


def count_with_transformers(architecture: dict[str, Any]) -> int:
    keys = {key: value for key, value in architecture.items() if key != "model_type"}
    config = AutoConfig.for_model(architecture["model_type"], vocab_size=128, **keys)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_parameters_are_counted_as_transformers_builds_them(
    architecture: dict[str, Any], tmp_path: Path
) -> None:
    expected = count_with_transformers(architecture)
    shape = model_shape(ModelConfig(architecture=architecture, tokenizer="characters"))
    assert shape is not None
    assert shape.num_parameters == expected
    (tmp_path / "config.json").write_text(json.dumps({**architecture, "vocab_size": 128}))
    assert model_shape(ModelConfig(path=str(tmp_path))) == shape


@pytest.mark.parametrize(
    "model",
    [
        {"path": "Qwen/Qwen3-8B"},
        {"architecture": {"model_type": "mamba"}, "tokenizer": "characters"},
        {"architecture": {"model_type": "qwen3"}, "tokenizer": "somebody/tokenizer"},
    ],
)
def test_what_cannot_be_known_is_not_guessed(model: dict[str, Any]) -> None:
    assert model_shape(ModelConfig.model_validate(model)) is None


def test_a_broken_model_folder_is_unknown_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert model_shape(ModelConfig(path=str(tmp_path))) is None


def test_the_quick_start_has_410k_parameters_and_room_for_all_its_sequences() -> None:
    config = load_config("quickstart")
    told = estimate(config)
    assert told.num_parameters == 410_368
    assert told.engine_sequences is not None
    assert told.engine_sequences >= config.rollout.max_num_seqs


def changed(**sections: dict[str, Any]) -> RunConfig:
    values = load_config("quickstart").model_dump()
    for name, keys in sections.items():
        values[name] |= keys
    return RunConfig.model_validate(values)


def test_optimiser_state_is_sixteen_bytes_a_parameter_divided_among_the_ranks() -> None:
    kept = {"master weights", "gradients", "optimiser"}
    for ranks in (1, 2, 4):
        memory = estimate(changed(learner={"num_ranks": ranks})).learner_rank
        assert memory is not None
        state = sum(size for part, size in memory.parts if part in kept)
        assert state == 16 * 410_368 // ranks


def test_what_is_off_loaded_is_counted_in_host_memory_not_on_the_gpu() -> None:
    def state(**learner: Any) -> tuple[int, int]:
        kept = {"weights", "master weights", "gradients", "optimiser"}
        told = estimate(changed(learner={"gpus_per_rank": 1, **learner}))
        assert told.learner_rank is not None
        assert told.learner_host is not None
        gpu, host = (
            sum(size for part, size in memory.parts if part in kept)
            for memory in (told.learner_rank, told.learner_host)
        )
        return gpu // 410_368, host // 410_368

    zero = {"engine": "deepspeed", "num_ranks": 2}
    assert state() == (16, 0)
    assert state(offload_optimizer=True) == (0, 16)
    assert state(**zero, deepspeed={"stage": 2}) == (4 + 8, 0)
    # the master shard, its gradients twice and both moments; the model's weights stay
    assert state(**zero, deepspeed={"stage": 2, "offload_optimizer": True}) == (4, 10)
    assert estimate(changed()).learner_host is None


def test_a_host_must_hold_the_whole_model_while_it_loads_however_many_ranks_share_it() -> None:
    def host(ranks: int) -> int:
        memory = estimate(changed(learner={"gpus_per_rank": 1, "num_ranks": ranks})).learner_host
        assert memory is not None
        return sum(size for part, size in memory.parts if part != "base")

    assert host(1) == 12 * 410_368  # the copy of a checkpoint, later, is larger
    assert host(64) == 4 * (410_368 + 410_368 // 64)


def test_checkpointing_and_smaller_microbatches_save_activations() -> None:
    def activations(**learner: Any) -> int:
        memory = estimate(changed(learner=learner)).learner_rank
        assert memory is not None
        return dict(memory.parts)["activations"]

    plain = activations()
    assert activations(activation_checkpointing=True) < plain
    assert activations(tokens_per_microbatch=4096) * 2 == plain


def test_what_ray_reserves_is_summed_over_workers_and_ranks() -> None:
    told = estimate(load_config("math_qwen3_8b_8gpu")).placement
    assert (told.num_rollout_workers, told.num_learner_ranks, told.gpus) == (4, 4, 8)
    cpus = changed(rollout={"num_workers": 3, "cpus_per_worker": 0.5}, learner={"cpus_per_rank": 2})
    assert estimate(cpus).placement.cpus == 3.5


def test_a_gpu_engine_has_no_fixed_cache() -> None:
    told = estimate(changed(rollout={"gpus_per_worker": 1, "tensor_parallel": 1}))
    assert told.engine_sequences is None
    assert told.engine is not None
    assert dict(told.engine.parts)["KV cache"] == 0
