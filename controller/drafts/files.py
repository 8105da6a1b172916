"""Files of completions to draft from at the start of a run: JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paceline.configs.errors import DataError
from paceline.configs.vocabulary import DraftText
from paceline.spec.draft_text import external_text

EXPECTED = "expected an object with prompt and completion, or prompt_token_ids and token_ids"

Encode = Callable[[str], Sequence[int]]


class DraftFileReader:
    """Reader of draft texts, with a run's tokenizer and vocabulary.

    ``encode_prompt`` and ``encode_completion`` make ids of texts; a completion is encoded without
    the stop token that ends it, which is ``stop_token_id``. Ids are below ``vocabulary_size``.
    """

    def __init__(
        self,
        encode_prompt: Encode,
        encode_completion: Encode,
        stop_token_id: int,
        vocabulary_size: int,
    ) -> None:
        self._encode_prompt = encode_prompt
        self._encode_completion = encode_completion
        self._stop_token_id = stop_token_id
        self._vocabulary_size = vocabulary_size

    def read(self, path: Path) -> Iterator[DraftText]:
        """Yield the texts of a file, line by line; empty lines do not count.

        A completion that says it was cut off (``finish_reason``: ``length``) has no stop token.

        Raises:
            DataError: there is no such file, or a line holds no completion.
        """
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield self._text(line, f"{path}, line {number}")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} in rollout.drafting.corpus cannot be read ({error}): expected JSON lines; "
                "correct the path, or leave it out"
            ) from error

    def _text(self, line: str, where: str) -> DraftText:
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise _wrong(where, f"no JSON ({error})") from error
        if not isinstance(fields, dict):
            raise _wrong(where, f"a {type(fields).__name__}")
        if "token_ids" in fields:
            names = ("prompt_token_ids", "token_ids")
            prompt, tokens = (self._ids(fields, name, where) for name in names)
        else:
            prompt, tokens = self._encoded(fields, where)
        return external_text(tuple(prompt), np.array(tokens, dtype=np.int32))

    def _ids(self, fields: Mapping[str, Any], name: str, where: str) -> list[int]:
        ids = fields.get(name)
        if not isinstance(ids, list) or not all(type(each) is int for each in ids):
            raise _wrong(where, f"{name} that is no list of integers")
        if ids and not 0 <= min(ids) <= max(ids) < self._vocabulary_size:
            raise _wrong(where, f"{name} outside of the vocabulary of {self._vocabulary_size}")
        return ids

    def _encoded(self, fields: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
        prompt, completion = fields.get("prompt"), fields.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise _wrong(where, f"{', '.join(sorted(fields)) or 'nothing'}")
        try:
            prompt_ids, tokens = self._encode_prompt(prompt), self._encode_completion(completion)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        is_cut_off = fields.get("finish_reason") == "length"
        return list(prompt_ids), [*tokens, *([] if is_cut_off else [self._stop_token_id])]


def _wrong(where: str, found: str) -> DataError:
    return DataError(f"{where}: got {found}, {EXPECTED}: correct the line or remove it")
