"""The journal of a running loop: events are checked against the state and committed in batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from paceline.configs.vocabulary import Group
from paceline.controller.ledger.events import Event, Kind
from paceline.controller.ledger.state import LedgerState, fold
from paceline.controller.ledger.store import Store

SNAPSHOT_FACTOR = 4
"""The state is written whole after so many times the events that it would take to write it: then it
adds a quarter to what is written, however much is pending."""


class Journal:
    """Record of what the loop does with groups and steps; the only way to the store during a run.

    Events reach the store in the order they were noted: a crash loses the last ones, never some in
    the middle. All that were noted during one commit go into the next. Their number is bounded:
    each event belongs to a group that holds a slot, or to a step.

    ``revocable`` says that steps may be done again from a checkpoint: batches then stay until they
    are settled. Otherwise a step is final as soon as it was trained.
    """

    def __init__(self, store: Store, *, revocable: bool = False) -> None:
        """Continue where the store's history ends.

        Raises:
            LedgerError: it cannot be read, or contradicts itself.
        """
        self.store = store
        self.state: LedgerState = fold(store.history())
        store.forget(sorted(store.group_ids() - self.state.live.keys()))
        self.state.gone.clear()
        self._revocable = revocable
        self._noted: list[Event] = []
        self._filling: asyncio.Future[None] | None = None  # done when what is noted is durable
        self._sending: asyncio.Future[None] | None = None  # done when what is being sent is
        self._failure: Exception | None = None
        self._since_snapshot = 0

    def note(
        self,
        kind: Kind,
        key: int,
        detail: Mapping[str, Any] | None = None,
        *,
        group: Group | None = None,
    ) -> None:
        """Note an event; it is durable soon, and before anything noted later.

        Raises:
            LedgerError: it cannot follow what came before, or an earlier event was not written.
        """
        event = Event(kind, key, time.time(), detail or {}, group)
        self.state.apply(event)
        self._append(event)
        if kind is Kind.TRAINED and not self._revocable:
            self._settle(key + 1)

    async def write(
        self,
        kind: Kind,
        key: int,
        detail: Mapping[str, Any] | None = None,
        *,
        group: Group | None = None,
    ) -> None:
        """Do as `note`, and wait until it is durable."""
        self.note(kind, key, detail, group=group)
        await self.flush()

    def begin(self, step: int) -> None:
        """Begin an empty ledger at a later step, for a run whose own ledger was not kept."""
        assert not self.state.admitted, "only an empty ledger can begin elsewhere"
        self.state = LedgerState(step=step, settled=step)
        self._snapshot()

    def settle(self, step: int) -> None:
        """Make training before ``step`` final: no checkpoint before it will be resumed from.

        Without anything to resume from, all that was trained is final already.
        """
        if self._revocable:
            self._settle(step)

    async def flush(self) -> None:
        """Return once all that was noted is durable."""
        last = self._filling or self._sending
        if last is not None:
            await asyncio.shield(last)

    async def close(self) -> None:
        """Write what is left and let go of the store."""
        try:
            await self.flush()
        finally:
            self.store.close()

    def _settle(self, step: int) -> None:
        event = Event(Kind.SETTLED, step, time.time())
        self.state.apply(event)
        self._append(event)
        if self._since_snapshot > SNAPSHOT_FACTOR * (1 + len(self.state.live)):
            self._snapshot()

    def _snapshot(self) -> None:
        whole = self.state.as_dict()
        self._append(Event(Kind.SNAPSHOT, self.state.step, time.time(), whole))
        self._since_snapshot = 0

    def _append(self, event: Event) -> None:
        if self._failure is not None:
            raise self._failure
        self._noted.append(event)
        self._since_snapshot += 1
        if not self.store.survives:
            self._send(*self._taken())
        elif self._filling is None:
            self._filling = asyncio.get_running_loop().create_future()
            if self._sending is None:
                self._writer = asyncio.create_task(self._commit(), name="journal")

    async def _commit(self) -> None:
        """Send what was noted until nothing is left, and resolve the futures of its waiters."""
        while self._filling is not None:
            self._sending, self._filling = self._filling, None
            try:
                await asyncio.to_thread(self._send, *self._taken())
            except Exception as error:
                self._fail(error)
                return
            self._sending.set_result(None)
            self._sending = None

    def _taken(self) -> tuple[list[Event], list[int]]:
        """Take the events to be sent, and the groups whose samples are not needed after that."""
        taken = self._noted, self.state.gone
        self._noted, self.state.gone = [], []
        return taken

    def _send(self, events: list[Event], gone: list[int]) -> None:
        self.store.append(events)
        if gone:
            self.store.forget(gone)

    def _fail(self, error: Exception) -> None:
        """Fail all pending and later notes: nothing can be written any more."""
        self._failure = error
        for future in (self._sending, self._filling):
            if future is not None:
                future.set_exception(error)
                future.exception()  # may have no waiter: the next note will raise it
