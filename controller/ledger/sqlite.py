"""A journal in one SQLite file in the run's folder: the store of a run without a Redis."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from paceline.configs.vocabulary import Group, Prompt
from paceline.controller.ledger.codec import decode_group, encode_group, verify
from paceline.controller.ledger.events import (
    SCHEMA,
    Event,
    Kind,
    LedgerError,
    as_row,
    from_row,
    require_schema,
)

APPLICATION_ID = 0x70616365  # "pace": tells our files from other SQLite databases
PAGE_BYTES = 16384  # samples are kilobytes: with small pages each is a long chain of them
WAL_PAGES = 4096  # 64 MiB before pages move from the write-ahead log into the file
TABLES = """
CREATE TABLE journal (sequence INTEGER PRIMARY KEY, kind TEXT, key INTEGER, time REAL, detail TEXT);
CREATE TABLE samples (group_id INTEGER PRIMARY KEY, content BLOB);
"""


class SQLiteStore:
    """Store with write-ahead logging: one writer, any number of readers, whole after any kill.

    ``synchronous`` "normal" survives the death of processes, "full" also that of the machine, at
    the price of waiting for the disk. Rows are kept for good, to be looked into; samples until
    they are not needed. A ``read_only`` store opens what another process may be writing.
    """

    survives = True

    def __init__(
        self,
        path: Path,
        synchronous: Literal["normal", "full"] = "normal",
        *,
        read_only: bool = False,
    ) -> None:
        """Open or create the file.

        Raises:
            LedgerError: it is in use, of another schema, no ledger, or cannot be read or written.
        """
        self._path = path
        if read_only and not path.exists():
            raise LedgerError(
                f"there is no ledger {path}: the run ended before it sampled anything, or kept its "
                "ledger elsewhere then (store in its config.yaml)"
            )
        self._lock = None if read_only else _locked(path)
        try:
            with self._explained():
                self._database = _connect(path, read_only=read_only)
                self._prepare(synchronous, read_only=read_only)
        except BaseException:
            self._unlock()
            raise

    def append(self, events: Sequence[Event]) -> None:
        """Write events and the samples with them in one transaction."""
        rows = [
            (self._last + i, *facts, json.dumps(detail))
            for i, (*facts, detail) in enumerate(map(as_row, events), 1)
        ]
        samples = [(r.key, encode_group(r.group)) for r in events if r.group is not None]
        with self._explained(), self._database:
            self._database.executemany("INSERT INTO journal VALUES (?, ?, ?, ?, ?)", rows)
            self._database.executemany("INSERT OR REPLACE INTO samples VALUES (?, ?)", samples)
        self._last += len(rows)

    def history(self, *, whole: bool = False) -> Iterator[Event]:
        """Yield events in order, from the last snapshot on, or all."""
        with self._explained():
            start = 1 if whole else self._last_snapshot()
            rows = self._database.execute(
                "SELECT sequence, kind, key, time, detail FROM journal WHERE sequence >= ? "
                "ORDER BY sequence",
                (start,),
            )
            for expected, (sequence, *row) in enumerate(rows, start):
                where = f"row {expected} of the ledger {self._path}"
                yield from_row(row if sequence == expected else None, where)

    def group(self, group_id: int, prompt: Prompt) -> Group:
        """Return a finished group."""
        return decode_group(self._content(group_id), prompt, group_id)

    def verify(self, group_id: int) -> None:
        """Check a finished group's samples."""
        verify(self._content(group_id), group_id)

    def group_ids(self) -> set[int]:
        """Return the ids of finished groups whose samples are kept."""
        with self._explained():
            return {row[0] for row in self._database.execute("SELECT group_id FROM samples")}

    def forget(self, group_ids: Sequence[int]) -> None:
        """Delete samples; their pages are used again."""
        with self._explained(), self._database:
            self._database.executemany(
                "DELETE FROM samples WHERE group_id = ?", [(group_id,) for group_id in group_ids]
            )

    def close(self) -> None:
        """Close the file, which folds the write-ahead log into it."""
        self._database.close()
        self._unlock()

    def _content(self, group_id: int) -> bytes:
        with self._explained():
            row = self._database.execute(
                "SELECT content FROM samples WHERE group_id = ?", (group_id,)
            ).fetchone()
        return row[0] if row else b""

    def _prepare(self, synchronous: str, *, read_only: bool) -> None:
        execute = self._database.execute
        version = execute("PRAGMA user_version").fetchone()[0]
        tables = execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise LedgerError(f"{self._path} is a database, but no ledger: move it away")
        if tables:
            require_schema(version, str(self._path))
        if not read_only:
            if not tables:
                execute(f"PRAGMA page_size = {PAGE_BYTES}")
            execute("PRAGMA journal_mode = WAL")
            execute(f"PRAGMA synchronous = {synchronous}")
            # Debian's SQLite writes zeros over what is deleted: samples need no such care.
            execute("PRAGMA secure_delete = OFF")
            execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
            if not tables:
                self._create()
        last = execute("SELECT max(sequence) FROM journal").fetchone()[0]
        self._last: int = last or 0

    def _create(self) -> None:
        """Create the tables in one transaction: a half-made ledger is never seen."""
        self._database.executescript(
            f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA}; "
            f"{TABLES} COMMIT;"
        )

    def _last_snapshot(self) -> int:
        row = self._database.execute(
            "SELECT max(sequence) FROM journal WHERE kind = ?", (Kind.SNAPSHOT.value,)
        ).fetchone()
        return row[0] or 1

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into one line."""
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(
                f"the ledger {self._path} cannot be used ({error}): free disk space and check the "
                "folder's permissions; if the file is damaged, restore it from a copy or move it "
                "away, and --resume samples anew what the checkpoint had in flight"
            ) from error

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    mode = "ro" if read_only else "rwc"
    # One thread at a time uses it, not always the same one.
    return sqlite3.connect(f"file:{_quoted(path)}?mode={mode}", uri=True, check_same_thread=False)


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _locked(path: Path) -> int:
    """Take the run's lock, which ends with this process however it ends.

    Raises:
        LedgerError: another process has it, or the folder cannot be written.
    """
    lock_path = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise LedgerError(
            f"the ledger {path} cannot be written ({error.strerror}): check the folder"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise LedgerError(
            f"the ledger {path} is in use: this run is going on in another process; wait for its "
            "end, or stop it"
        ) from error
    return descriptor
