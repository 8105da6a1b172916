"""Where weights begin: seeded, one origin, and refused by name where they do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from paceline.configs.errors import ModelError
from paceline.configs.schema.model import ModelConfig
from paceline.learner.model.model import empty_policy, load_policy, write_initial_model
from tests.learner.conftest import VOCAB_SIZE, model_config


def weights(folder):
    return dict(load_policy(str(folder)).causal_lm.named_parameters())


def test_initial_weights_depend_on_the_seed_and_on_nothing_else(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(7)
        write_initial_model(model_config(), VOCAB_SIZE, 1, seed, str(tmp_path / name))
    a, b, c = (weights(tmp_path / name)["model.embed_tokens.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_writing_a_model_leaves_the_global_random_stream_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write_initial_model(model_config(), VOCAB_SIZE, 1, 0, str(tmp_path))
    assert torch.equal(torch.rand(3), expected)


def test_tied_embeddings_are_one_parameter_and_untied_ones_two(tmp_path):
    for tied, count in ((True, 0), (False, 1)):
        folder = str(tmp_path / str(tied))
        write_initial_model(model_config(tie_word_embeddings=tied), VOCAB_SIZE, 1, 0, folder)
        assert sum(name == "lm_head.weight" for name in weights(folder)) == count


def test_the_written_config_takes_vocabulary_end_token_and_context_from_the_run(model_folder):
    with open(f"{model_folder}/config.json") as file:
        config = json.load(file)
    assert (config["vocab_size"], config["eos_token_id"]) == (VOCAB_SIZE, 1)
    assert config["max_position_embeddings"] == 64


def test_a_model_given_by_path_is_used_where_it_lies(model_folder, tmp_path):
    config = ModelConfig(path=model_folder, max_length=64)
    assert write_initial_model(config, VOCAB_SIZE, 1, 0, str(tmp_path / "new")) == model_folder
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen33"}, "qwen33.*not a transformers architecture"),
        ({"hiden_size": 32}, "does not know: hiden_size"),
        ({"head_dim": 7}, "cannot be built: .*head_dim"),
        ({"max_position_embeddings": 10}, "exceeds the 10 positions"),
    ],
)
def test_an_unusable_architecture_is_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(ModelError, match=words) as caught:
        write_initial_model(model_config(**change), VOCAB_SIZE, 1, 0, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_missing_or_unreadable_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        config = ModelConfig(path=str(tmp_path / name))
        with pytest.raises(ModelError, match="Hugging Face format") as caught:
            write_initial_model(config, VOCAB_SIZE, 1, 0, str(tmp_path / "new"))
        assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused_in_one_line(model_folder, tmp_path):
    shutil.copy(f"{model_folder}/config.json", tmp_path)
    with pytest.raises(ModelError, match="weights in .* cannot be loaded") as caught:
        load_policy(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_all_there_are_refused_instead_of_made_up(model_folder, tmp_path):
    """Qwen3's norms of queries and keys, which a Qwen2 has not."""
    write_initial_model(model_config("qwen2"), VOCAB_SIZE, 1, 0, str(tmp_path))
    shutil.copy(f"{model_folder}/config.json", tmp_path)
    with pytest.raises(ModelError, match=r"lacks 4 weights of a qwen3, such as model\.layers\.0"):
        load_policy(str(tmp_path))


def test_a_model_without_weights_has_the_names_and_shapes_of_the_loaded_one(model_folder):
    for has_values in (False, True):
        empty = dict(empty_policy(model_folder, has_values=has_values).trained_parameters())
        whole = dict(load_policy(model_folder, has_values=has_values).trained_parameters())
        assert {n: p.shape for n, p in empty.items()} == {n: p.shape for n, p in whole.items()}
        assert all(parameter.is_meta for parameter in empty.values())


def test_a_tokenizer_larger_than_the_model_is_refused(model_folder, tmp_path):
    config = ModelConfig(path=model_folder, max_length=64)
    with pytest.raises(ModelError, match="41 tokens but the model embeds 40"):
        write_initial_model(config, VOCAB_SIZE + 1, 1, 0, str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "settings", "words"),
    [
        ("granite", {"logits_scaling": 3.0}, "granite computes other logits in packed rows"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "lfm2 computes other logits"),
        ("gemma2", {"head_dim": 8}, "caps attention scores"),
    ],
)
def test_a_model_that_is_not_itself_in_packed_rows_is_refused(
    model_type, settings, words, tmp_path
):
    config = model_config(model_type, **settings)
    write_initial_model(config, VOCAB_SIZE, 1, 0, str(tmp_path))
    with pytest.raises(ModelError, match=words):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("model_type", ["granite", "mistral", "qwen3_moe", "phi3", "olmo2"])
def test_other_plain_attention_models_are_accepted(model_type, tmp_path):
    config = model_config(model_type)
    write_initial_model(config, VOCAB_SIZE, 1, 0, str(tmp_path))
    load_policy(str(tmp_path))
