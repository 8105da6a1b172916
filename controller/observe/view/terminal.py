"""A terminal kept for one writer while all other output goes to a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def is_terminal(stream: TextIO) -> bool:
    """Return whether the stream is this process's standard output and can be redrawn."""
    try:
        return stream.isatty() and stream.fileno() == 1 and os.environ.get("TERM") != "dumb"
    except (AttributeError, OSError, ValueError):
        return False


@contextmanager
def reserved_terminal(log: Path) -> Iterator[TextIO]:
    """Yield the terminal; until the block ends, file descriptors 1 and 2 lead to ``log``.

    Descriptors, not ``sys.stdout``: log handlers hold on to the stream they were made with, and C
    libraries and child processes (Ray's among them) know nothing of Python's streams. What is
    written after the block, tracebacks included, reaches the terminal again.
    """
    _flush()
    saved = (os.dup(1), os.dup(2))
    try:
        with log.open("ab") as file, os.fdopen(os.dup(1), "w", encoding="utf-8") as terminal:
            try:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                yield terminal
            finally:
                _flush()
                os.dup2(saved[0], 1)
                os.dup2(saved[1], 2)
    finally:
        for descriptor in saved:
            os.close(descriptor)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
