"""A history on disk, so that a resumed run drafts from what it knew.

Kept are the sequences, not the automata: four bytes a token, and a file cannot bring a structure
that does not hold together. The file is a line of JSON (format, numbers of sequences, bytes and
tokens, checksum of these numbers and of the rest), then for each sequence its generation (int64)
and the lengths of its problem (int32, UTF-8 bytes) and text (int32, tokens), then all problems,
then all tokens; little-endian.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from paceline.configs.errors import CheckpointError
from paceline.spec.history import History

FORMAT = "paceline history 1"
MAX_HEADER_BYTES = 4096
SEQUENCE = np.dtype([("generation", "<i8"), ("problem_bytes", "<i4"), ("num_tokens", "<i4")])


class _Header(NamedTuple):
    num_sequences: int
    problem_bytes: int
    num_tokens: int
    checksum: str

    def numbers(self) -> tuple[int, int, int]:
        return self.num_sequences, self.problem_bytes, self.num_tokens


def save_history(history: History, path: Path) -> None:
    """Write all that is known, open sequences as they stand, to ``path``, whole or not at all."""
    rows: list[tuple[int, int, int]] = []
    problems: list[bytes] = []
    texts: list[NDArray[np.int32]] = []
    for summary in history.summaries():
        name = summary.problem.encode()
        for tokens in history.sequences(summary.problem, summary.generation):
            rows.append((summary.generation, len(name), tokens.size))
            problems.append(name)
            texts.append(tokens.astype("<i4", copy=False))
    names = b"".join(problems)
    parts = [np.array(rows, SEQUENCE).tobytes(), names, *(text.tobytes() for text in texts)]
    header = _Header(len(rows), len(names), sum(text.size for text in texts), "")
    header = header._replace(checksum=_checksum(header, parts))
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        file.write(json.dumps({"format": FORMAT, **header._asdict()}).encode() + b"\n")
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_history(path: Path, into: History) -> None:
    """Add what ``path`` holds, oldest generation first; learning it anew takes 1-2 s a million.

    What does not fit into the window or the memory of ``into`` is dropped as ever. Raises
    ``CheckpointError``, with nothing added, if the file is missing, damaged or of another format.
    """
    try:
        with path.open("rb") as file:
            header = _read_header(file, path)
            body = file.read()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): expected a saved history; "
            "without it drafting starts cold"
        ) from error
    rows_end = header.num_sequences * SEQUENCE.itemsize
    names_end = rows_end + header.problem_bytes
    expected = names_end + 4 * header.num_tokens
    if len(body) != expected:
        raise _damaged(path, f"it holds {len(body)} bytes after its header instead of {expected}")
    if _checksum(header, [body]) != header.checksum:
        raise _damaged(path, "its checksum does not match")
    tokens = np.frombuffer(body, "<i4", offset=names_end).astype(np.int32, copy=False)
    name_at, token_at = rows_end, 0
    for row in np.frombuffer(body, SEQUENCE, count=header.num_sequences):
        problem = body[name_at : name_at + row["problem_bytes"]].decode()
        into.add(problem, int(row["generation"]), tokens[token_at : token_at + row["num_tokens"]])
        name_at += int(row["problem_bytes"])
        token_at += int(row["num_tokens"])


def _read_header(file: BinaryIO, path: Path) -> _Header:
    line = file.readline(MAX_HEADER_BYTES)
    try:
        fields = json.loads(line)
        found = fields.pop("format")
        header = _Header(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, "it does not begin with the header of one") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{path} is of format {found!r}, expected {FORMAT!r}: "
            "load it with the Paceline that wrote it, or remove it to start cold"
        )
    numbers = header.numbers()
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _damaged(path, f"its header counts {numbers}")
    return header


def _checksum(header: _Header, parts: Iterable[bytes]) -> str:
    checksum = xxhash.xxh3_128(repr(header.numbers()).encode())
    for part in parts:
        checksum.update(part)
    return checksum.hexdigest()


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no whole saved history: {why}; restore it from a copy, "
        "or remove it to start cold"
    )
