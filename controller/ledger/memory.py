"""A journal in this process's memory: for tests, and for runs that need no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paceline.configs.vocabulary import Group, Prompt
from paceline.controller.ledger.events import Event, Kind, LedgerError, as_row, from_row


class MemoryStore:
    """Store that keeps groups as they are, and no history before the last snapshot."""

    survives = False

    def __init__(self) -> None:
        # Beside each other: tuples without dictionaries, and dictionaries without containers, are
        # nothing the garbage collector would look at again and again.
        self._facts: list[tuple[str, int, float]] = []
        self._details: list[Mapping[str, Any]] = []
        self._groups: dict[int, Group] = {}

    def append(self, events: Sequence[Event]) -> None:
        """Keep events and groups."""
        for event in events:
            if event.kind is Kind.SNAPSHOT:
                self._facts.clear()
                self._details.clear()
            if event.group is not None:
                self._groups[event.key] = event.group
            kind, key, time, detail = as_row(event)
            self._facts.append((kind, key, time))
            self._details.append(detail)

    def history(self, *, whole: bool = False) -> Iterator[Event]:
        """Return the events since the last snapshot, with it."""
        rows = tuple(zip(self._facts, self._details, strict=True))
        return (from_row((*facts, detail), "memory") for facts, detail in rows)

    def group(self, group_id: int, prompt: Prompt) -> Group:
        """Return a finished group."""
        group = self._groups.get(group_id)
        if group is None or group.prompt.id != prompt.id:
            raise LedgerError(f"the ledger has no samples of group {group_id}, prompt {prompt.id}")
        return group

    def verify(self, group_id: int) -> None:
        """Check that a finished group is there."""
        if group_id not in self._groups:
            raise LedgerError(f"the samples of group {group_id} are missing")

    def group_ids(self) -> set[int]:
        """Return the ids of finished groups that are kept."""
        return set(self._groups)

    def forget(self, group_ids: Sequence[int]) -> None:
        """Let go of groups."""
        for group_id in group_ids:
            self._groups.pop(group_id, None)

    def close(self) -> None:
        """Do nothing: no file or connection is open."""
