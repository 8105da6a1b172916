"""Draft texts as bytes: for transport to engines and on disk, so that a resumed run is warm.

Tokens are kept, not automata: four bytes each, and a file cannot hold an inconsistent structure.
Of each text, `packed_arrays` has its version (int64), its prompt's place (int32, counted from 0)
and its length (int32); of each prompt its length (int32); then the tokens of all prompts and of all
texts (int32).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paceline.configs.errors import CheckpointError
from paceline.configs.packed_arrays import (
    UnreadableError,
    is_whole,
    pack_arrays,
    unpack_arrays,
)
from paceline.configs.vocabulary import DraftText

FORMAT = "paceline draft texts 2"
TOKEN = np.dtype("<i4")
_NO_TOKENS = np.empty(0, TOKEN)


def pack(texts: Iterable[DraftText]) -> bytes:
    """Return all texts as bytes, in order; a prompt that several have is written once."""
    texts = list(texts)
    places: dict[tuple[int, ...], int] = {}
    for text in texts:
        places.setdefault(text.prompt_token_ids, len(places))
    arrays = {
        "versions": [np.array([text.version for text in texts], "<i8")],
        "prompts": [np.array([places[text.prompt_token_ids] for text in texts], "<i4")],
        "lengths": [np.array([len(text.token_ids) for text in texts], "<i4")],
        "prompt_lengths": [np.array([len(prompt) for prompt in places], "<i4")],
        "prompt_tokens": [_NO_TOKENS, *(np.array(prompt, TOKEN) for prompt in places)],
        "tokens": [_NO_TOKENS, *(np.asarray(text.token_ids, TOKEN) for text in texts)],
    }
    return pack_arrays(FORMAT, {}, arrays)


def unpack(content: bytes, where: str) -> list[DraftText]:
    """Return what was packed; ``where`` names its place in errors.

    Raises:
        CheckpointError: it is damaged or of another format.
    """
    if not is_whole(content):
        raise CheckpointError(
            f"{where}: no whole saved draft texts, its checksum does not match; restore them from "
            "a copy, or remove them to start cold"
        )
    try:
        _, arrays = unpack_arrays(FORMAT, content)
    except UnreadableError as error:
        raise CheckpointError(
            f"{where}: draft texts of format {error}: use the Paceline that wrote them, or remove "
            "them to start cold"
        ) from error
    prompts = [
        tuple(prompt.tolist())
        for prompt in _split(arrays["prompt_tokens"], arrays["prompt_lengths"])
    ]
    texts = _split(arrays["tokens"], arrays["lengths"])
    return [
        DraftText(prompts[prompt], version, text)
        for prompt, version, text in zip(
            arrays["prompts"].tolist(), arrays["versions"].tolist(), texts, strict=True
        )
    ]


def save_draft_texts(texts: Iterable[DraftText], path: Path) -> None:
    """Write texts to ``path``, whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        file.write(pack(texts))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_draft_texts(path: Path) -> list[DraftText]:
    """Return what was saved.

    Raises:
        CheckpointError: the file is missing, damaged or of another format.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): expected saved draft texts; without them "
            "drafting starts cold"
        ) from error
    return unpack(content, str(path))


def _split(tokens: NDArray[np.int32], lengths: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """Return ``tokens`` in pieces of these lengths."""
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    return [tokens[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
