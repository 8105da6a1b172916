"""The state that a journal adds up to: the status of every group, and the balance (pure).

A group's life, by the event that moves it on::

    ADMITTED -> WAITING -> CLAIMED -> CLAIMED -> FINISHED -> FINISHED -> BATCHED -> BATCHED
                   ^---- RETURNED ----|                           |
                                             SET_ASIDE, or BATCHED as dropped: gone, counted
    BATCHED -> TRAINED -> TRAINED -> SETTLED -> gone, counted
       ^----- RESUMED -------|

``TRAINED`` can be taken back as long as an older checkpoint may be resumed from: training is then
done again from the recorded batch, on weights that do not know it yet. ``SETTLED`` makes it final.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from paceline.controller.ledger.events import Event, Kind, LedgerError


class Status(StrEnum):
    """Status of a group."""

    WAITING = "waiting"
    CLAIMED = "claimed"
    FINISHED = "finished"
    BATCHED = "batched"
    TRAINED = "trained"


PENDING = (Status.WAITING, Status.CLAIMED, Status.FINISHED, Status.BATCHED)


@dataclass(slots=True)
class Life:
    """One group that is pending, or trained but not settled; ``claims`` counts its attempts."""

    status: Status
    claims: int = 0
    oldest: int | None = None
    newest: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Groups that one step trains on; see `AssembledBatch` for ``held``.

    ``rewards`` are the mean rewards of dropped groups, as far as they were graded: their samples
    are gone, and a curriculum that is resumed from a checkpoint needs them again.
    """

    step: int
    trained: tuple[int, ...]
    held: tuple[int, ...]
    dropped: Mapping[int, str]
    rewards: Mapping[int, float] = field(default_factory=dict)

    @property
    def slots(self) -> tuple[int, ...]:
        """Groups whose slots the step holds."""
        return self.trained + self.held

    def as_detail(self) -> dict[str, Any]:
        """Return what its event says besides the step."""
        detail = {"trained": self.trained, "held": self.held, "dropped": dict(self.dropped)}
        return detail | ({"rewards": dict(self.rewards)} if self.rewards else {})

    @classmethod
    def from_detail(cls, step: int, detail: Mapping[str, Any]) -> Batch:
        """Rebuild it from what `as_detail` gave, or from its JSON, where ids are strings."""
        dropped = {int(group_id): str(reason) for group_id, reason in detail["dropped"].items()}
        rewards = {int(i): float(reward) for i, reward in detail.get("rewards", {}).items()}
        return cls(step, tuple(detail["trained"]), tuple(detail["held"]), dropped, rewards)


@dataclass(frozen=True)
class Balance:
    """Counts of groups; ``admitted = trained + dropped + pending`` in an intact ledger."""

    admitted: int
    trained: int
    dropped: Mapping[str, int]
    pending: Mapping[str, int]

    @property
    def missing(self) -> int:
        """Admitted groups that are nowhere (positive), or groups too many (negative)."""
        accounted = self.trained + sum(self.dropped.values()) + sum(self.pending.values())
        return self.admitted - accounted


@dataclass
class LedgerState:
    """The sum of all events so far. Its size is that of what is pending or not settled.

    ``step`` is the next to train, ``last`` the highest id admitted, ``settled`` the step before
    which training is final; ``trained`` and ``dropped`` count groups that are gone. ``ages`` counts
    batched groups by the age of their oldest token at their step, ``returned`` claims given back,
    ``resumed`` resumptions. ``checksums`` are of the weights that each step not settled made, and
    ``diverged`` the steps that made others when they were done again. ``gone`` collects groups
    whose samples are not needed any more, until the journal takes them.
    """

    live: dict[int, Life] = field(default_factory=dict)
    batches: dict[int, Batch] = field(default_factory=dict)
    step: int = 0
    settled: int = 0
    last: int = -1
    admitted: int = 0
    trained: int = 0
    returned: int = 0
    resumed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    ages: Counter[int] = field(default_factory=Counter)
    checksums: dict[int, int | None] = field(default_factory=dict)
    diverged: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)

    def apply(self, event: Event) -> None:
        """Move on by one event, or stay as it is.

        Raises:
            LedgerError: it cannot follow what came before: something is lost, or twice. Or it does
                not say what an event of its kind says.
        """
        try:
            _ACTIONS[event.kind](self, event)
        except LedgerError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LedgerError(
                f"the ledger's event {event.kind} {event.key} lacks something or says what cannot "
                f"be ({type(error).__name__}: {error}): it is damaged; restore it from a copy"
            ) from error

    def balance(self) -> Balance:
        """Return the present balance."""
        counts = Counter(life.status for life in self.live.values())
        return Balance(
            admitted=self.admitted,
            trained=self.trained + counts[Status.TRAINED],
            dropped=dict(self.dropped),
            pending={status.value: counts[status] for status in PENDING},
        )

    def with_status(self, *statuses: Status) -> list[int]:
        """Return the ids of groups of these statuses, ascending."""
        return sorted(i for i, life in self.live.items() if life.status in statuses)

    def untrained_batches(self) -> list[Batch]:
        """Return recorded batches that are still to be trained, in order."""
        return [self.batches[step] for step in sorted(self.batches) if step >= self.step]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: a snapshot."""
        lives = {i: [v.status, v.claims, v.oldest, v.newest] for i, v in self.live.items()}
        batches = [[batch.step, *batch.as_detail().values()] for batch in self.batches.values()]
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {
            **counts,
            "dropped": dict(self.dropped),
            "ages": dict(self.ages),
            "live": lives,
            "batches": batches,
            "checksums": dict(self.checksums),
            "diverged": list(self.diverged),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LedgerState:
        """Rebuild the state from what `as_dict` gave, or from its JSON."""
        batches = {
            step: Batch.from_detail(step, dict(zip(_BATCH_KEYS, detail, strict=False)))
            for step, *detail in values["batches"]
        }
        counts: dict[str, Any] = {name: int(values[name]) for name in _COUNTS}
        return cls(
            live={int(i): Life(Status(s), *rest) for i, (s, *rest) in values["live"].items()},
            batches=batches,
            dropped=Counter(values["dropped"]),
            ages=Counter({int(age): count for age, count in values["ages"].items()}),
            checksums={int(step): checksum for step, checksum in values["checksums"].items()},
            diverged=list(values["diverged"]),
            **counts,
        )

    def _admitted(self, event: Event) -> None:
        if event.key <= self.last:
            raise LedgerError(
                f"the ledger admits group {event.key} after group {self.last}: expected ids to "
                "grow; two runs may share it, or it was edited"
            )
        self.last = event.key
        self.admitted += 1
        self.live[event.key] = Life(Status.WAITING)

    def _claimed(self, event: Event) -> None:
        self._move(event.key, Status.WAITING, Status.CLAIMED).claims += 1

    def _returned(self, event: Event) -> None:
        self._move(event.key, Status.CLAIMED, Status.WAITING)
        self.returned += 1

    def _finished(self, event: Event) -> None:
        oldest, newest = _version(event.detail["oldest"]), _version(event.detail["newest"])
        life = self._move(event.key, Status.CLAIMED, Status.FINISHED)
        life.oldest, life.newest = oldest, newest

    def _batched(self, event: Event) -> None:
        step = event.key
        batch = Batch.from_detail(step, event.detail)
        if step != max(self.batches, default=self.step - 1) + 1:
            raise LedgerError(f"the ledger has a batch for step {step} out of order: it is damaged")
        groups = (*batch.trained, *batch.dropped)
        if len(set(groups)) < len(groups):
            raise LedgerError(f"the ledger has a group in step {step} twice: it is damaged")
        for group_id in groups:
            self._require(group_id, Status.FINISHED, Status.BATCHED)
        for group_id in batch.trained:
            self._move(group_id, Status.FINISHED, Status.BATCHED)
        self._count_ages(batch, 1)
        for group_id, reason in batch.dropped.items():
            self._drop(group_id, reason)
        self.batches[step] = batch

    def _set_aside(self, event: Event) -> None:
        self._drop(event.key, str(event.detail["reason"]))

    def _trained(self, event: Event) -> None:
        if event.key != self.step or event.key not in self.batches:
            raise LedgerError(
                f"the ledger trains step {event.key}, expected step {self.step} and its batch: it "
                "is damaged"
            )
        checksum = event.detail.get("checksum")
        for group_id in self.batches[event.key].trained:
            self._move(group_id, Status.BATCHED, Status.TRAINED)
        if self.checksums.setdefault(event.key, checksum) != checksum:
            self.diverged.append(event.key)
            self.checksums[event.key] = checksum
        self.step += 1

    def _resumed(self, event: Event) -> None:
        if not self.settled <= event.key <= self.step:
            raise LedgerError(
                f"the ledger has steps {self.settled} to {self.step}, the checkpoint is of step "
                f"{event.key}: one of them is of another time or run; resume from the newest "
                "checkpoint, or move the ledger away to sample anew what was not trained by then"
            )
        kept = event.detail.get("keep_batches", True)
        self.step = event.key
        self.resumed += 1
        for batch in self.untrained_batches():
            for group_id in batch.trained:
                self.live[group_id].status = Status.BATCHED if kept else Status.FINISHED
            if not kept:
                self._count_ages(batch, -1)
                del self.batches[batch.step]
                self.checksums.pop(batch.step, None)
        for group_id in self.with_status(Status.CLAIMED):
            self._move(group_id, Status.CLAIMED, Status.WAITING)

    def _settled(self, event: Event) -> None:
        if not self.settled <= event.key <= self.step:
            raise LedgerError(
                f"the ledger settles step {event.key}, expected {self.settled} to {self.step}: it "
                "is damaged"
            )
        for step in [step for step in self.batches if step < event.key]:
            batch = self.batches.pop(step)
            self.checksums.pop(step, None)
            for group_id in batch.trained:
                del self.live[group_id]
            self.trained += len(batch.trained)
            self.gone += batch.trained
        self.settled = event.key

    def _snapshot(self, event: Event) -> None:
        whole = LedgerState.from_dict(event.detail)
        batched = Counter(
            group_id for batch in whole.batches.values() for group_id in batch.trained
        )
        if whole.balance().missing or batched != Counter(
            whole.with_status(Status.BATCHED, Status.TRAINED)
        ):
            raise LedgerError(
                f"the ledger's snapshot at step {event.key} does not add up: it is damaged; "
                "restore it from a copy"
            )
        vars(self).update(vars(whole), gone=self.gone)

    def _move(self, group_id: int, expected: Status, status: Status) -> Life:
        life = self._require(group_id, expected, status)
        life.status = status
        return life

    def _require(self, group_id: int, expected: Status, status: Status) -> Life:
        life = self.live.get(group_id)
        if life is None or life.status is not expected:
            raise LedgerError(
                f"the ledger has group {group_id} {life.status if life else 'gone or unknown'} "
                f"where it becomes {status}; expected it {expected}: an event is lost or doubled"
            )
        return life

    def _count_ages(self, batch: Batch, count: int) -> None:
        for group_id in batch.trained:
            oldest = self.live[group_id].oldest
            if oldest is not None:  # a demonstration has no age
                self.ages[batch.step - oldest] += count

    def _drop(self, group_id: int, reason: str) -> None:
        self._move(group_id, Status.FINISHED, Status.BATCHED)
        del self.live[group_id]
        self.dropped[reason] += 1
        self.gone.append(group_id)


_BATCH_KEYS = ("trained", "held", "dropped", "rewards")
_COUNTS = ("step", "settled", "last", "admitted", "trained", "returned", "resumed")
_ACTIONS = {
    Kind.ADMITTED: LedgerState._admitted,
    Kind.CLAIMED: LedgerState._claimed,
    Kind.RETURNED: LedgerState._returned,
    Kind.FINISHED: LedgerState._finished,
    Kind.BATCHED: LedgerState._batched,
    Kind.TRAINED: LedgerState._trained,
    Kind.SET_ASIDE: LedgerState._set_aside,
    Kind.RESUMED: LedgerState._resumed,
    Kind.SETTLED: LedgerState._settled,
    Kind.SNAPSHOT: LedgerState._snapshot,
}


def fold(events: Iterable[Event]) -> LedgerState:
    """Return the state after all events.

    Raises:
        LedgerError: one of them cannot follow those before.
    """
    state = LedgerState()
    for event in events:
        state.apply(event)
    return state


def _version(value: Any) -> int | None:
    return None if value is None else int(value)
