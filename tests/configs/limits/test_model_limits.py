"""What is known to fail once a run's processes are started is refused before, in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from paceline.configs.errors import ConfigError, ModelError
from paceline.configs.forecast.model_shape import model_shape
from paceline.configs.limits.model_limits import INDEX, SINGLE, require_usable_models
from paceline.configs.load import load_config
from paceline.controller.run.run import run_training

QUICKSTART = load_config("quickstart").model.architecture
KEYS = {**QUICKSTART, "vocab_size": 128}


def safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of float32 zeros."""
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + 4 * rows * columns
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def whole_folder(folder: Path, **keys: Any) -> Path:
    """A model of the quick start's size in two files; names do not matter to its number."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**KEYS, **keys}))
    shape = model_shape(load_config("quickstart").model)
    rest = (1, shape.num_parameters - 1000)
    safetensors(folder / "one.safetensors", {"a": (10, 100), "lm_head.weight": (128, 128)})
    safetensors(folder / "two.safetensors", {"b": rest})
    places = {"a": "one.safetensors", "lm_head.weight": "one.safetensors", "b": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def config_of(path: object, *overrides: str):
    given = ["model.architecture=null", f"model.path={path}", *overrides]
    return load_config("quickstart", given)


def refusal(config) -> str:
    with pytest.raises((ConfigError, ModelError)) as caught:
        require_usable_models(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_folder_and_a_hub_name_are_accepted(tmp_path):
    require_usable_models(config_of(whole_folder(tmp_path / "model")))
    require_usable_models(config_of("Qwen/Qwen3-0.6B"))


def test_a_path_that_is_no_model_is_refused(tmp_path):
    for path in (tmp_path / "nowhere", "./nowhere", tmp_path):
        assert "is no folder with a config.json" in refusal(config_of(path))
    (tmp_path / "config.json").write_text(json.dumps(KEYS))
    assert f"has no weights: expected {SINGLE}" in refusal(config_of(tmp_path))


def test_missing_and_truncated_shards_are_named(tmp_path):
    folder = whole_folder(tmp_path / "model")
    shard = folder / "two.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    found = refusal(config_of(folder))
    assert f"two.safetensors has {len(whole) - 1} bytes, expected {len(whole)}" in found
    shard.write_bytes(whole[:12])
    assert "two.safetensors is no whole safetensors file" in refusal(config_of(folder))
    shard.unlink()
    assert "is incomplete: two.safetensors is missing" in refusal(config_of(folder))
    (folder / INDEX).write_text('{"weight_map": ')
    assert "cannot be read as an index" in refusal(config_of(folder))


@pytest.mark.parametrize(
    "keys", [{"model_type": "qwen2"}, {"vocab_size": 256}, {"num_hidden_layers": 3}], ids=str
)
def test_weights_of_another_model_are_refused(tmp_path, keys):
    found = refusal(config_of(whole_folder(tmp_path / "model", **keys)))
    assert "holds 410,368 parameters, its config.json describes a qwen" in found


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    found = refusal(config_of(whole_folder(tmp_path / "model", vocab_size=64)))
    assert "the tokenizer has 128 tokens" in found and "embeds 64" in found


def test_packed_weights_are_left_to_who_loads_them(tmp_path):
    folder = whole_folder(tmp_path / "model", vocab_size=256, quantization_config={})
    require_usable_models(config_of(folder))


def test_the_teachers_and_the_references_folders_are_looked_at_too(tmp_path):
    config = load_config("quickstart", ["algorithm.reference={path: ./nowhere}"])
    assert "the reference's path ./nowhere is no folder" in refusal(config)


ROUTERS = ["rollout.router_replay=true", "rollout.enforce_eager=true"]


def test_routers_are_replayed_only_where_there_are_any(tmp_path):
    assert "qwen3 has none that are known" in refusal(load_config("quickstart", ROUTERS))
    folder = whole_folder(tmp_path / "model", model_type="mixtral")
    assert "mixtral has none that are known" in refusal(config_of(folder, *ROUTERS))
    with_experts = ["model.architecture.model_type=qwen3_moe", *ROUTERS]
    require_usable_models(load_config("quickstart", with_experts))


def test_a_model_that_is_refused_leaves_nothing(tmp_path):
    config = load_config("quickstart", [f"output_dir={tmp_path / 'runs'}", *ROUTERS])
    with pytest.raises(ConfigError, match="router_replay"):
        run_training(config, resume=False)
    assert not (tmp_path / "runs").exists()
