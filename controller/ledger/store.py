"""The protocol of a journal's store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from paceline.configs.vocabulary import Group, Prompt
from paceline.controller.ledger.events import Event


class Store(Protocol):
    """An append-only journal and, beside it, the samples of finished groups.

    Called from one thread at a time, blocking. Every method may raise `LedgerError`, one line that
    says what to do: unreachable, refused, of another schema, corrupt. Nothing is overwritten then.
    """

    @property
    def survives(self) -> bool:
        """True if what was appended outlives this process."""

    def append(self, events: Sequence[Event]) -> None:
        """Write events behind all others, in order, all or none.

        When this returns they survive the death of any process, the store's own included. After a
        lost connection the same call can be repeated: nothing is written twice.
        """

    def history(self, *, whole: bool = False) -> Iterator[Event]:
        """Return events in order, without groups: from the last snapshot on, or all kept."""

    def group(self, group_id: int, prompt: Prompt) -> Group:
        """Return a finished group as it was appended, last attempt; ``prompt`` is the one it
        answers.

        Raises:
            LedgerError: it is missing or damaged, or answers another prompt.
        """

    def verify(self, group_id: int) -> None:
        """Read a finished group's samples without making anything of them.

        Raises:
            LedgerError: they are missing or damaged.
        """

    def group_ids(self) -> set[int]:
        """Return the ids of finished groups whose samples are kept."""

    def forget(self, group_ids: Sequence[int]) -> None:
        """Delete the samples of groups that will not be needed again; unknown ids are fine."""

    def close(self) -> None:
        """Let go of files and connections."""
