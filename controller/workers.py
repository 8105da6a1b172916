"""The pool of rollout workers: routing, weight updates, replacement of dead workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from paceline.configs.errors import ClusterError
from paceline.configs.vocabulary import Completion, RolloutRequest, WeightVersion
from paceline.controller.parts import WorkerLost
from paceline.weights_sync.handle import WeightHandle, WeightSyncError

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """A rollout worker as the controller sees it; once dead, its calls raise `WorkerLost`."""

    async def generate(self, request: RolloutRequest) -> tuple[Completion, ...]:
        """All completions of a request."""

    async def update_weights(self, handle: WeightHandle) -> tuple[WeightVersion, int]:
        """Load a version; answers the version and checksum now served."""

    async def counters(self) -> dict[str, float]:
        """Running totals of its engine."""

    async def close(self) -> None:
        """Stop it; never raises."""


@dataclass
class Seat:
    """A place in the pool: the worker in it, its load, and whether it may be given requests."""

    index: int
    worker: Worker
    outstanding: int = 0
    serving: bool = False
    num_restarts: int = 0
    restart: asyncio.Task[None] | None = None
    updating: asyncio.Lock = field(default_factory=asyncio.Lock)


class WorkerPool:
    """Spreads requests over the workers that serve the current version.

    A worker serves from the moment it acknowledged the current version and its checksum. A dead one
    is replaced in its seat, at most ``max_restarts`` times, and brought to the current version
    before it gets requests again.
    """

    def __init__(
        self,
        workers: list[Worker],
        start_worker: Callable[[int], Awaitable[Worker]],
        max_restarts: int,
    ) -> None:
        self._seats = [Seat(index, worker) for index, worker in enumerate(workers)]
        self._start_worker = start_worker
        self._max_restarts = max_restarts
        self._current: WeightHandle | None = None
        self._changed = asyncio.Condition()
        self._failure: Exception | None = None

    async def generate(self, request: RolloutRequest) -> tuple[Completion, ...]:
        """Sample on the serving worker with the fewest outstanding samples; waits where none
        serves.

        Raises:
            WorkerLost: the worker died; ask again, another will serve.
            ClusterError: workers died more often than they may be replaced.
        """
        return await self._generate_in(await self._least_loaded(), request)

    async def generate_everywhere(self, request: RolloutRequest) -> list[tuple[Completion, ...]]:
        """The same request on every serving worker: for checks, not for training.

        A worker that dies over it gives no answer.
        """
        answers: list[tuple[Completion, ...]] = []

        async def ask(seat: Seat) -> None:
            with contextlib.suppress(WorkerLost):
                answers.append(await self._generate_in(seat, request))

        await asyncio.gather(*(ask(seat) for seat in self._seats if seat.serving))
        return answers

    async def update_weights(self, handle: WeightHandle) -> None:
        """Return once every live worker serves ``handle``; replacements catch up on their own."""
        self._current = handle
        await asyncio.gather(*(self._bring_up_to_date(seat) for seat in self._seats))

    async def counters(self) -> list[dict[str, float]]:
        """Running totals of every live worker's engine, in seat order."""
        results = await asyncio.gather(
            *(seat.worker.counters() for seat in self._seats), return_exceptions=True
        )
        return [result for result in results if not isinstance(result, BaseException)]

    def states(self) -> dict[str, str]:
        """What each worker is doing, in a few words."""
        served = "-" if self._current is None else f"v{self._current.version}"
        return {
            f"rollout {seat.index}": (
                f"{served}, {seat.outstanding} samples" if seat.serving else "restarting"
            )
            for seat in self._seats
        }

    async def close(self) -> None:
        """Stop every worker."""
        for seat in self._seats:
            if seat.restart:
                seat.restart.cancel()
        await asyncio.gather(*(seat.worker.close() for seat in self._seats))

    async def _generate_in(self, seat: Seat, request: RolloutRequest) -> tuple[Completion, ...]:
        worker = seat.worker
        seat.outstanding += request.num_samples
        try:
            return await worker.generate(request)
        except WorkerLost:
            self._replace(seat, worker)
            raise
        finally:
            if seat.worker is worker:
                seat.outstanding -= request.num_samples

    async def _least_loaded(self) -> Seat:
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._failure or any(seat.serving for seat in self._seats)
            )
            if self._failure:
                raise self._failure
            serving = (seat for seat in self._seats if seat.serving)
            return min(serving, key=lambda seat: (seat.outstanding, seat.index))

    async def _bring_up_to_date(self, seat: Seat) -> None:
        worker = seat.worker
        try:
            await self._acknowledge(seat)
        except WorkerLost:
            self._replace(seat, worker)

    async def _acknowledge(self, seat: Seat) -> None:
        """Update a seat's worker until it has what is current by then; it serves from there on."""
        handle = None
        async with seat.updating:
            while handle is not self._current:
                handle = self._current
                assert handle is not None, "no weights were published yet"
                answer = await seat.worker.update_weights(handle)
                if answer != (handle.version, handle.checksum):
                    raise WeightSyncError(
                        f"worker {seat.index} acknowledged version {answer[0]} with checksum "
                        f"{answer[1]:016x}, expected {handle.version} with {handle.checksum:016x}"
                    )
        async with self._changed:
            seat.serving = True
            self._changed.notify_all()

    def _replace(self, seat: Seat, lost: Worker) -> None:
        """Start a replacement for a dead worker, once however many calls found it dead."""
        if seat.worker is lost and seat.restart is None:
            seat.serving = False
            name = f"restart-worker-{seat.index}"
            seat.restart = asyncio.create_task(self._restart(seat), name=name)

    async def _restart(self, seat: Seat) -> None:
        try:
            while not seat.serving:
                seat.num_restarts += 1
                if seat.num_restarts > self._max_restarts:
                    raise ClusterError(
                        f"rollout worker {seat.index} died {times(seat.num_restarts)} and "
                        f"rollout.max_restarts is {self._max_restarts}: its log says why; if "
                        "memory ran out, lower rollout.max_num_seqs or rollout.kv_cache_mb"
                    )
                logger.warning("rollout worker %d died: starting another", seat.index)
                seat.worker = await self._start_worker(seat.index)
                seat.outstanding = 0
                with contextlib.suppress(WorkerLost):
                    await self._acknowledge(seat)
            logger.warning("rollout worker %d serves again", seat.index)
        except Exception as error:
            self._failure = error
            async with self._changed:
                self._changed.notify_all()
        finally:
            seat.restart = None


def times(count: int) -> str:
    """How often something happened, in words."""
    return "once" if count == 1 else f"{count} times"
