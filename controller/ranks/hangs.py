"""Who holds up whom: from what every learner rank says of itself to the one to name (pure).

A collective ends on all its ranks or on none. So where one rank stands still, the others soon wait
for it, or for one that waits for it. The chain ends at a rank that began fewer collectives than its
neighbours, and has no neighbour that began fewer still. A rank that no other waits for may work as
long as it likes; one that stands still in Python then neither computes nor reads or writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from paceline.configs.vocabulary import RankProgress

BUSY_SHARE = 0.1
"""Of a CPU's time that a rank at work takes, or waits for."""


@dataclass(frozen=True)
class RankStatus:
    """A rank during a call, or between two (``call`` None); ``number`` counts its calls.

    ``seconds`` in this call, ``place`` the innermost line of its thread, ``waits_in`` the
    collective that line is in, ``stacks`` those of all its threads. ``busy_seconds`` are those
    that its process ran or it waited for a CPU, ``disk_blocks`` what its process read and wrote.
    """

    call: str | None
    number: int
    seconds: float
    progress: RankProgress
    place: str
    waits_in: str | None
    stacks: str
    busy_seconds: float
    disk_blocks: int

    @property
    def mark(self) -> tuple[object, ...]:
        """The mark that changes as long as the rank gets on."""
        return (self.number, self.progress.doing, tuple(sorted(self.progress.collectives.items())))

    def works_since(self, before: RankStatus, seconds: float) -> bool:
        """Return whether it computed or used the disk in the ``seconds`` since ``before``."""
        busy = self.busy_seconds - before.busy_seconds
        return busy >= BUSY_SHARE * seconds or self.disk_blocks != before.disk_blocks


@dataclass(frozen=True)
class Hang:
    """Ranks that do not answer (``silent``), that the others wait for (``behind``; none where every
    rank waits and none is behind) or that do nothing (``idle``), with what all said last."""

    ranks: tuple[int, ...]
    seconds: float
    kind: Literal["silent", "behind", "idle"]
    statuses: Mapping[int, RankStatus | None]

    def message(self) -> str:
        """Return one line: who, where, since when, and who waits for it."""
        said = [self._describe(rank) for rank in self.ranks]
        waiting = [
            f"rank {rank} in {status.waits_in} {_where(status)}"
            for rank, status in self.statuses.items()
            if status is not None and status.waits_in and rank not in self.ranks
        ]
        others = f"; waiting: {', '.join(waiting)}" if waiting else ""
        if not self.ranks:
            said = [f"every learner rank waits for {self.seconds:.0f} s and none is behind"]
            return f"{said[0]}{others}: look at the network between them"
        return f"{'; '.join(said)}{others}"

    def _describe(self, rank: int) -> str:
        status = self.statuses[rank]
        if self.kind == "silent" or status is None:
            last = "" if status is None else f", last seen {_where(status)}"
            return (
                f"learner rank {rank} does not answer for {self.seconds:.0f} s, its process is "
                f"stopped or stuck{last}"
            )
        does = "does nothing" if self.kind == "idle" else "holds up the others"
        return (
            f"learner rank {rank} {does} for {self.seconds:.0f} s: {_where(status)}, at "
            f"{status.place}"
        )

    def report(self) -> str:
        """Return what every rank said last, with the stacks of its threads."""
        parts = [self.message()]
        for rank, status in sorted(self.statuses.items()):
            if status is None:
                parts.append(f"== learner rank {rank}: never answered")
                continue
            is_silent = self.kind == "silent" and rank in self.ranks
            late = ", does not answer since" if is_silent else ""
            waits = f", waits in {status.waits_in}" if status.waits_in else ""
            parts.append(
                f"== learner rank {rank}: {_where(status)} for {status.seconds:.0f} s{waits}, at "
                f"{status.place}{late}\ncollectives begun: {dict(status.progress.collectives)}\n\n"
                f"{status.stacks}"
            )
        return "\n\n".join(parts) + "\n"


def _where(status: RankStatus) -> str:
    progress = status.progress
    doing = f" ({progress.doing})" if progress.doing else ""
    return f"in {status.call or 'no call'}{doing} of step {progress.version}"


class HangWatch:
    """Finds a hang in looks at all ranks, none of which got on for ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last: dict[int, RankStatus] = {}
        self._since: dict[int, float] = {}
        self._idle_since: dict[int, float] = {}
        self._answered: dict[int, float] = {}

    def observe(self, now: float, look: Mapping[int, RankStatus | None]) -> Hang | None:
        """Return the hang that a look at ``now`` shows; None is a rank that did not answer.

        Ranks that work long are no hang as long as no other waits for them in a collective; those
        that do nothing are.
        """
        for rank, status in look.items():
            self._answered.setdefault(rank, now)
            if status is None:
                continue
            before = self._last.get(rank)
            if before is None or before.mark != status.mark:
                self._since[rank] = self._idle_since[rank] = now
            elif status.works_since(before, now - self._answered[rank]):
                self._idle_since[rank] = now
            self._answered[rank] = now
            self._last[rank] = status
        known = {rank: self._last.get(rank) for rank in look}
        quiet = {rank: now - self._answered[rank] for rank in look}
        if silent := [rank for rank, seconds in quiet.items() if seconds >= self._seconds]:
            return Hang(tuple(silent), max(quiet[rank] for rank in silent), "silent", known)
        if None in look.values():
            return None
        statuses = {rank: status for rank, status in known.items() if status is not None}
        active = [rank for rank, status in statuses.items() if status.call is not None]
        still = min((now - self._since[rank] for rank in active), default=0.0)
        if still < self._seconds:
            return None
        blamed = held_up_by(statuses)
        if blamed or any(statuses[rank].waits_in for rank in active):
            return Hang(tuple(blamed), still, "behind", known)
        idle = {rank: now - self._idle_since[rank] for rank in active}
        if all(seconds < self._seconds for seconds in idle.values()):
            return None
        ranks = tuple(rank for rank, seconds in idle.items() if seconds >= self._seconds)
        return Hang(ranks, min(idle[rank] for rank in ranks), "idle", known)


def held_up_by(statuses: Mapping[int, RankStatus]) -> list[int]:
    """Return the ranks that the others wait for when nothing moves; none where none is behind.

    One that is in a call and in no collective, while another is, is held up by none.
    """
    active = [rank for rank, status in statuses.items() if status.call is not None]
    free = [rank for rank in active if not statuses[rank].waits_in]
    if len(free) == len(active):
        free = []  # a GPU's collectives wait on the device: no line of Python tells of them
    begun = {rank: status.progress.collectives for rank, status in statuses.items()}
    if len(free) == 1:
        return free
    ends = [
        rank
        for rank in free or statuses
        if any(_is_behind(begun[rank], other) for other in begun.values())
        and not any(_is_behind(other, begun[rank]) for other in begun.values())
    ]
    return ends or free


def _is_behind(mine: Mapping[str, int], theirs: Mapping[str, int]) -> bool:
    """Return whether they began a collective that I did not come to."""
    return any(mine[group] < theirs[group] for group in mine.keys() & theirs.keys())
