"""The folder of a run's published weights, in memory that learner and engines share."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "paceline-"
SETTLING_SECONDS = 60.0
"""Younger folders are left alone: their run may be about to lock them."""


@contextmanager
def shared_folder(root: Path | None = None) -> Iterator[str]:
    """Make a new folder for one run, removed when the block ends.

    A killed run cannot remove its own, and weights are large: the next run on the machine removes
    what it left. A folder is locked for as long as its run lives; unlike a process id, a lock means
    the same in every container that shares the memory.
    """
    root = memory_root() if root is None else root
    remove_abandoned(root)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=root))
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned(root: Path) -> None:
    """Remove the folders of runs that were killed; other users' and living runs' stay."""
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or just removed by another run
            if time.time() - folder.stat().st_mtime < SETTLING_SECONDS:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def memory_root() -> Path:
    """Return where files live in memory, if the system has such a place."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())
