"""Draft texts from files: read as the run's tokens, or refused in one line."""

from __future__ import annotations

import json

import pytest

from paceline.configs.errors import DataError
from paceline.controller.data.tokenizer import characters_tokenizer, encode
from paceline.controller.drafts.files import DraftFileReader
from paceline.controller.observe.files.records import SampleRecord

TOKENIZER = characters_tokenizer()


def encoded(text):
    return encode(TOKENIZER, text, special_tokens=False)


def read(path):
    reader = DraftFileReader(encoded, encoded, TOKENIZER.eos_token_id, len(TOKENIZER))
    return list(reader.read(path))


def written(tmp_path, *lines):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_texts_and_ids_are_the_same_text(tmp_path):
    ids = {
        "prompt_token_ids": encoded("2+2="),
        "token_ids": [*encoded("4"), TOKENIZER.eos_token_id],
    }
    text = {"prompt": "2+2=", "completion": "4", "reward": 1.0}
    one, other = read(written(tmp_path, json.dumps(ids), "", json.dumps(text), ""))
    assert one.prompt_token_ids == other.prompt_token_ids == encoded("2+2=")
    whole = [*encoded("2+2="), *ids["token_ids"]]
    assert one.token_ids.tolist() == other.token_ids.tolist() == whole
    assert one.version == other.version == -1


def test_samples_of_an_earlier_run_can_be_given(tmp_path):
    finished = SampleRecord(3, "a", "bc", 1.0, versions=(2,))
    cut_off = SampleRecord(3, "a", "bc", 0.0, versions=(2,), finish_reason="length")
    lines = [json.dumps(sample.as_dict()) for sample in (finished, cut_off)]
    one, other = read(written(tmp_path, *lines))
    assert one.token_ids.tolist() == [*encoded("abc"), TOKENIZER.eos_token_id]
    assert other.token_ids.tolist() == [*encoded("abc")]


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("{", "no JSON"),
        ("[1]", "a list"),
        ("{}", "nothing"),
        ('{"prompt": "a"}', "prompt"),
        ('{"prompt": "a", "completion": ["b"]}', "completion, prompt"),
        ('{"token_ids": [1]}', "prompt_token_ids that is no list of integers"),
        ('{"prompt_token_ids": [1], "token_ids": [true]}', "token_ids that is no list"),
        ('{"prompt_token_ids": [1], "token_ids": [128]}', "token_ids outside of the vocab"),
        ('{"prompt_token_ids": [-1], "token_ids": [1]}', "prompt_token_ids outside of the vocab"),
        ('{"prompt": "ä", "completion": "b"}', "'ä'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, got):
    path = written(tmp_path, '{"prompt": "a", "completion": "b"}', line)
    with pytest.raises(DataError) as refused:
        read(path)
    message = str(refused.value)
    assert message.startswith(f"{path}, line 2: ") and got in message and "\n" not in message


def test_a_missing_file_and_one_that_is_no_text_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere in rollout.drafting.corpus cannot be read"):
        read(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="binary in rollout.drafting.corpus cannot be read"):
        read(tmp_path / "binary")
