"""JSON Lines that survive a crash: appended line by line, read without their torn last line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self, cast


class JsonLines:
    """A file of JSON objects, one a line, each handed to the system as it is appended."""

    def __init__(self, path: Path) -> None:
        _end_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; numbers that are not finite become null, as JSON has none."""
        self._file.write(json.dumps(plain(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file in order, and how many lines were unreadable.

    A missing file is an empty one. A process that died while writing leaves a torn last line;
    that one (and any other that is not an object) is counted, not raised.
    """
    records, num_unreadable = [], 0
    for line in _lines(path):
        record = _parse(line)
        if record is None:
            num_unreadable += 1
        else:
            records.append(record)
    return records, num_unreadable


def plain(value: object) -> Any:
    """Return the value as JSON has it: numpy scalars unwrapped, None for numbers not finite."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    unwrapped = cast(Any, value).item() if hasattr(value, "item") else value
    return None if isinstance(unwrapped, float) and not math.isfinite(unwrapped) else unwrapped


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content in one step: readers see the old text or the new, never a part."""
    with _replacement(path) as file:
        file.write(text)


def write_json(path: Path, content: object) -> None:
    """Write one indented JSON document atomically."""
    write_atomically(path, json.dumps(plain(content), indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the document in the file, or None where the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file's lines atomically."""
    with _replacement(path) as file:
        file.writelines(json.dumps(plain(record)) + "\n" for record in records)


@contextmanager
def _replacement(path: Path) -> Iterator[IO[str]]:
    """Return a file beside ``path`` that takes its place when the block ends without an error."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # `replace` because sampled text may hold lone surrogates, which UTF-8 cannot carry.
        with draft.open("w", encoding="utf-8", errors="replace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line for line in file if line.strip())


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _end_torn_line(path: Path) -> None:
    """End a torn last line, so that the next record does not continue it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
