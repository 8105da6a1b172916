"""Draft texts as bytes: for transport to engines and on disk, so that a resumed run is warm.

Tokens are kept, not automata: four bytes each, and a file cannot hold an inconsistent structure.
The bytes are a line of JSON (format, how much follows, checksum of these numbers and of the rest),
then the length of each prompt (int32), then of each text its version (int64), prompt (int32,
counted from 0) and length (int32), then the tokens of all prompts and of all texts (int32);
little-endian.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from paceline.configs.errors import CheckpointError
from paceline.configs.vocabulary import DraftText

FORMAT = "paceline draft texts 1"
MAX_HEADER_BYTES = 4096
ROW = np.dtype([("version", "<i8"), ("prompt", "<i4"), ("num_tokens", "<i4")])
TOKEN = np.dtype("<i4")


class _Header(NamedTuple):
    num_prompts: int
    num_texts: int
    num_prompt_tokens: int
    num_tokens: int
    checksum: str

    def numbers(self) -> tuple[int, ...]:
        return self[:-1]

    @property
    def num_bytes(self) -> int:
        """Size of what follows the header."""
        num_ids = self.num_prompts + self.num_prompt_tokens + self.num_tokens
        return self.num_texts * ROW.itemsize + num_ids * TOKEN.itemsize


def pack(texts: Iterable[DraftText]) -> bytes:
    """Return all texts as bytes, in order; a prompt that several have is written once."""
    places: dict[tuple[int, ...], int] = {}
    rows: list[tuple[int, int, int]] = []
    contents: list[bytes] = []
    for text in texts:
        place = places.setdefault(text.prompt_token_ids, len(places))
        rows.append((text.version, place, len(text.token_ids)))
        contents.append(text.token_ids.astype(TOKEN, copy=False).tobytes())
    lengths = np.array([len(prompt) for prompt in places], TOKEN)
    prompts = [np.array(prompt, TOKEN).tobytes() for prompt in places]
    parts = [lengths.tobytes(), np.array(rows, ROW).tobytes(), *prompts, *contents]
    num_tokens = sum(length for _, _, length in rows)
    header = _Header(len(places), len(rows), int(lengths.sum()), num_tokens, "")
    header = header._replace(checksum=_checksum(header, parts))
    line = json.dumps({"format": FORMAT, **header._asdict()}).encode() + b"\n"
    return b"".join((line, *parts))


def unpack(content: bytes, where: str) -> list[DraftText]:
    """Return what was packed; ``where`` names its place in errors.

    Raises:
        CheckpointError: it is damaged or of another format.
    """
    line, _, body = content.partition(b"\n")
    header = _header(line, where)
    if len(body) != header.num_bytes:
        raise _damaged(where, f"{len(body)} bytes after its header instead of {header.num_bytes}")
    if _checksum(header, [body]) != header.checksum:
        raise _damaged(where, "its checksum does not match")
    lengths = np.frombuffer(body, TOKEN, header.num_prompts)
    rows = np.frombuffer(body, ROW, header.num_texts, lengths.nbytes)
    tokens = np.frombuffer(body, TOKEN, offset=lengths.nbytes + rows.nbytes)
    tokens = tokens.astype(np.int32, copy=False)
    prompts = [tuple(prompt.tolist()) for prompt in _split(tokens, lengths)]
    texts = _split(tokens[header.num_prompt_tokens :], rows["num_tokens"])
    return [
        DraftText(prompts[prompt], version, text)
        for (version, prompt, _), text in zip(rows.tolist(), texts, strict=True)
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


def _header(line: bytes, where: str) -> _Header:
    try:
        fields = json.loads(line[:MAX_HEADER_BYTES])
        found = fields.pop("format")
        header = _Header(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(where, "they do not begin with the header of such") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{where}: draft texts of format {found!r}, expected {FORMAT!r}: use the Paceline that "
            "wrote them, or remove them to start cold"
        )
    numbers = header.numbers()
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _damaged(where, f"their header counts {numbers}")
    return header


def _split(tokens: NDArray[np.int32], lengths: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """Return the first tokens of ``tokens`` in pieces of these lengths."""
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    return [tokens[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def _checksum(header: _Header, parts: Iterable[bytes]) -> str:
    checksum = xxhash.xxh3_128(repr(header.numbers()).encode())
    for part in parts:
        checksum.update(part)
    return checksum.hexdigest()


def _damaged(where: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: no whole saved draft texts, {why}; restore them from a copy, or remove them to "
        "start cold"
    )
