from __future__ import annotations

import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen3Config

from paceline.configs.errors import DataError, ModelError
from paceline.configs.forecast.model_shape import CHARACTERS_VOCABULARY
from paceline.configs.schema.model import ModelConfig
from paceline.controller.data.tokenizer import (
    characters_tokenizer,
    decode_completion,
    encode,
    load_tokenizer,
)

TOKENIZER = characters_tokenizer()
STOPS = {1}
PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " \t\n"


@given(st.text(alphabet=PRINTABLE).filter(lambda text: "<" not in text))
def test_every_character_is_the_token_of_its_ascii_code_and_decodes_back(text: str) -> None:
    ids = encode(TOKENIZER, text, special_tokens=True)
    assert ids == tuple(ord(character) for character in text)
    assert decode_completion(TOKENIZER, STOPS, [*ids, TOKENIZER.eos_token_id]) == text


def test_the_vocabulary_is_as_large_as_the_estimate_assumes() -> None:
    assert len(TOKENIZER) == TOKENIZER.vocab_size == CHARACTERS_VOCABULARY


def test_padding_or_reserved_tokens_inside_a_completion_stay_visible() -> None:
    text = decode_completion(TOKENIZER, STOPS, [ord("a"), 0, 2, 1, ord("b"), 1])
    assert text == "a<pad><reserved_2><eos>b"


def test_only_the_stop_token_at_the_end_is_left_out() -> None:
    assert decode_completion(TOKENIZER, STOPS, [ord("a"), 1, 1]) == "a<eos>"
    assert decode_completion(TOKENIZER, STOPS, []) == ""


@pytest.mark.parametrize("text", ["naïve", "bell\x07", "日本"])
def test_characters_without_a_token_are_named(text: str) -> None:
    stranger = next(character for character in text if character not in PRINTABLE)
    with pytest.raises(DataError) as caught:
        encode(TOKENIZER, text, special_tokens=False)
    assert repr(stranger) in str(caught.value)


def test_a_saved_folder_loads_by_itself_beside_a_model_configuration(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    Qwen3Config(vocab_size=128).save_pretrained(tmp_path)
    text = "a, b\n\tc  d ."
    for tokenizer in (
        AutoTokenizer.from_pretrained(tmp_path),
        load_tokenizer(ModelConfig(path=str(tmp_path))),
    ):
        assert tokenizer.encode(text) == [ord(character) for character in text]
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
        assert decode_completion(tokenizer, STOPS, tokenizer.encode(text)) == text


@pytest.mark.slow
def test_vllm_loads_the_saved_folder(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    script = (
        "from vllm.tokenizers import get_tokenizer\n"
        f"tokenizer = get_tokenizer({str(tmp_path)!r})\n"
        "assert tokenizer.encode('abc=') == [97, 98, 99, 61]\n"
        "assert tokenizer.eos_token_id == 1 and tokenizer.max_token_id == 127\n"
    )
    pytest.importorskip("vllm")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_missing_folder_is_said_to_be_missing_without_asking_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "nowhere")))


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds none") as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_end_a_text_is_refused(tmp_path: Path) -> None:
    tokenizer = characters_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
