"""A journal in Redis Streams: for a cluster, where the controller may come back on another machine.

Keys of a run, by name:

- ``paceline:NAME:journal``: a stream with an entry for each append, trimmed at every snapshot;
- ``paceline:NAME:finished``: a stream with the samples of each finished group (``group``: its id,
  ``content``: see `codec`), deleted once they are not needed. The consumer group ``learner`` stands
  for what training has taken over for good; other readers attach groups of their own;
- ``paceline:NAME:schema``: the version of all this.

Entry ids are not Redis's clock but our own count of appends, those of samples with a number of the
controller's own behind it. An append that is repeated after a lost connection therefore cannot be
written twice: its ids are taken. The same shows a controller that another has taken its run over.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from redis import exceptions

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
from paceline.controller.ledger.redis_server import Command, RedisServer, explained, is_taken

CONSUMERS = "learner"
SAMPLES_AT_ONCE = 8
"""Groups that are read at a time: each may be megabytes."""
PRESENT = """
local found = {}
for i, id in ipairs(ARGV) do found[i] = #redis.call('XRANGE', KEYS[1], id, id) end
return found
"""
"""Lua script: which entries exist, without sending their content."""


class RedisStore:
    """Store of one run in a Redis with an append-only file.

    A lost connection is tried again for ``reconnect_seconds``: a Redis that is restarted from its
    file has all that it had acknowledged. A ``read_only`` store changes nothing.
    """

    survives = True

    def __init__(
        self,
        url: str,
        name: str,
        *,
        password: str | None = None,
        reconnect_seconds: float = 60.0,
        read_only: bool = False,
    ) -> None:
        """Connect, and find where the run's journal ends.

        Raises:
            LedgerError: no answer, refused, volatile, of another schema, or damaged.
        """
        self._owner = uuid.uuid4().int >> 65  # what an id of Redis can hold
        self._consumer = f"controller-{self._owner}"
        self._keys = {part: f"paceline:{name}:{part}" for part in ("journal", "finished", "schema")}
        self._read_only = read_only
        self._has_taken_over = read_only
        self._server = RedisServer(url, password, reconnect_seconds)
        self._redis, self._ask, self._url = self._server.client, self._server.ask, url
        with explained(url):
            self._check_schema(write=not read_only)
            if not read_only:
                self._create_consumers()
        self._last = 0
        self._samples: dict[int, str] = {}
        for number, entry in self._entries():
            self._last = number
            self._follow(entry)
        self._samples = self._present(self._samples)
        self._find_leftovers()

    def append(self, events: Sequence[Event]) -> None:
        """Write samples of finished groups, then the entry that makes them count.

        Each is sent as soon as it is encoded, so that Redis works on one while we encode the next.
        """
        number = self._last + 1
        finished = [event for event in events if event.group is not None]
        places = {
            event.key: f"{self._next_sample + i}-{self._owner}" for i, event in enumerate(finished)
        }
        entry = self._entry(events, places)

        def samples() -> Iterator[Command]:
            for event in finished:
                assert event.group is not None
                fields = ("group", event.key, "content", encode_group(event.group))
                yield ("XADD", self._keys["finished"], places[event.key], *fields)

        if self._ask(self._server.stream, samples) and len(self._present(places)) < len(places):
            raise self._taken_over()
        if not self._ask(self._commit, number, entry) and not self._is_ours(number):
            raise self._taken_over()
        self._last = number
        self._next_sample += len(finished)
        self._follow({b"samples": entry["samples"].encode()})
        self._delete_leftovers()

    def history(self, *, whole: bool = False) -> Iterator[Event]:
        """Yield events in order, from the last snapshot on: no others are kept."""
        is_first = True
        for number, entry in self._entries():
            if self._read_only:  # another process may have written it since this was opened
                self._follow(entry)
            where = f"entry {number} of the ledger {self._keys['journal']} in {self._url}"
            events = [from_row(row, where) for row in _json(entry[b"events"], where)]
            # What an entry holds before its snapshot was not trimmed with the entries before it.
            yield from _from_snapshot(events) if is_first else events
            is_first = False

    def group(self, group_id: int, prompt: Prompt) -> Group:
        """Return a finished group."""
        return decode_group(self._content(group_id), prompt, group_id)

    def verify(self, group_id: int) -> None:
        """Check a finished group's samples."""
        verify(self._content(group_id), group_id)

    def group_ids(self) -> set[int]:
        """Return the ids of finished groups whose samples are kept."""
        return set(self._present(self._samples) if self._read_only else self._samples)

    def forget(self, group_ids: Sequence[int]) -> None:
        """Acknowledge and delete samples."""
        sample_ids = [self._samples.pop(i) for i in group_ids if i in self._samples]
        if not sample_ids:
            return

        def send() -> None:
            with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.xack(self._keys["finished"], CONSUMERS, *sample_ids)
                pipeline.xdel(self._keys["finished"], *sample_ids)
                pipeline.execute()

        self._ask(send)

    def close(self) -> None:
        """Close the connection."""
        self._server.close()

    def _commit(self, number: int, entry: dict[str, str]) -> bool:
        """Write the journal's entry; False where there is one of this number."""
        entry_id = f"{number}-1"
        # One command: were the trimming another, it would be done though the entry was refused.
        trim = {"minid": entry_id, "approximate": False} if "snapshot" in entry else {}
        try:
            self._redis.xadd(self._keys["journal"], entry, id=entry_id, **trim)
        except exceptions.ResponseError as error:
            if not is_taken(error):
                raise
            return False
        return True

    def _entry(self, events: Sequence[Event], places: Mapping[int, str]) -> dict[str, str]:
        entry = {
            "owner": str(self._owner),
            "events": json.dumps([as_row(event) for event in events]),
        }
        if not any(event.kind is Kind.SNAPSHOT for event in events):
            return entry | {"samples": json.dumps(places)}
        # What is trimmed may say where samples are that are still needed: say it here.
        return entry | {"samples": json.dumps({**self._samples, **places}), "snapshot": "1"}

    def _follow(self, entry: dict[bytes, bytes]) -> None:
        """Remember where an entry's samples are."""
        found = _json(entry[b"samples"], f"the ledger {self._keys['journal']} in {self._url}")
        self._samples |= {int(group_id): sample_id for group_id, sample_id in found.items()}

    def _present(self, samples: Mapping[int, str]) -> dict[int, str]:
        """Select the samples that are there: some were deleted since their entry was written."""
        if not samples:
            return {}
        key, places = self._keys["finished"], samples.values()
        present = self._ask(self._redis.eval, PRESENT, 1, key, *places)
        return dict(itertools.compress(samples.items(), present))

    def _find_leftovers(self) -> None:
        """Find the id of our next samples, and those a dead controller left without an entry."""
        known = [int(place.split("-")[0]) for place in self._samples.values()]
        stream = self._ask(self._redis.exists, self._keys["finished"]) and self._ask(
            self._redis.xinfo_stream, self._keys["finished"]
        )
        last = int(stream["last-generated-id"].split(b"-")[0]) if stream else 0
        self._next_sample = last + 1
        self._leftovers: tuple[int, int] | None = (max(known, default=0) + 1, last)

    def _delete_leftovers(self) -> None:
        """Delete leftovers once an entry of ours stands: earlier their controller may be alive."""
        if self._leftovers is None:
            return
        (first, last), self._leftovers = self._leftovers, None
        key = self._keys["finished"]
        while found := self._ask(self._redis.xrange, key, first, last, count=SAMPLES_AT_ONCE):
            self._ask(self._redis.xdel, key, *(entry_id for entry_id, _ in found))

    def _entries(self) -> Iterator[tuple[int, dict[bytes, bytes]]]:
        """Yield the numbered entries from the last snapshot on, as they were at one moment.

        Raises:
            LedgerError: one is missing or lacks a field.
        """
        expected = None
        for entry_id, entry in self._ask(self._redis.xrange, self._keys["journal"]):
            number = int(entry_id.split(b"-")[0])
            if expected not in (None, number) or not {b"events", b"samples"} <= entry.keys():
                raise LedgerError(
                    f"entry {expected or number} of the ledger {self._keys['journal']} in "
                    f"{self._url} is missing or damaged: restore Redis from its append-only "
                    "file, or continue under another name"
                )
            expected = number + 1
            yield number, entry

    def _take_over(self) -> None:
        """Have all samples that are not finally trained delivered to this consumer.

        The first are those delivered to dead controllers; then those never delivered.
        """
        stream, start = self._keys["finished"], "0-0"
        while True:
            start, *_ = self._ask(
                self._redis.xautoclaim,
                stream,
                CONSUMERS,
                self._consumer,
                min_idle_time=0,
                start_id=start,
                count=SAMPLES_AT_ONCE,
            )
            if start == b"0-0":
                break
        while self._ask(
            self._redis.xreadgroup,
            CONSUMERS,
            self._consumer,
            {stream: ">"},
            count=SAMPLES_AT_ONCE,
        ):
            pass
        self._has_taken_over = True

    def _content(self, group_id: int) -> bytes:
        if not self._has_taken_over:
            self._take_over()
        sample_id = self._samples.get(group_id)
        if sample_id is None:
            return b""
        found = self._ask(self._redis.xrange, self._keys["finished"], sample_id, sample_id)
        return bytes(found[0][1][b"content"]) if found else b""

    def _is_ours(self, number: int) -> bool:
        """Return whether the entry that is there already is the one we sent before a lost reply."""
        entry_id = f"{number}-1"
        found = self._ask(self._redis.xrange, self._keys["journal"], entry_id, entry_id)
        return bool(found) and found[0][1].get(b"owner") == str(self._owner).encode()

    def _taken_over(self) -> LedgerError:
        return LedgerError(
            f"another controller writes to the ledger {self._keys['journal']} in {self._url}: it "
            "has taken this run over, or two runs have one name; stop one of them"
        )

    def _check_schema(self, *, write: bool) -> None:
        version = self._redis.get(self._keys["schema"])
        if version is None and write:
            self._redis.set(self._keys["schema"], SCHEMA, nx=True)
        elif version is not None:
            require_schema(int(version), f"the ledger {self._keys['journal']} in {self._url}")

    def _create_consumers(self) -> None:
        with contextlib.suppress(exceptions.ResponseError):  # it exists: BUSYGROUP
            self._redis.xgroup_create(self._keys["finished"], CONSUMERS, id="0", mkstream=True)


def _from_snapshot(events: list[Event]) -> list[Event]:
    """Return events from the last snapshot among them on, all if there is none."""
    snapshots = [i for i, event in enumerate(events) if event.kind is Kind.SNAPSHOT]
    return events[snapshots[-1] :] if snapshots else events


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise LedgerError(
            f"{where} is damaged ({error}): restore Redis from its append-only file, or continue "
            "under another name"
        ) from error
