"""A pool of workers: routing of requests, weight updates, replacement of lost workers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from paceline.configs.errors import ClusterError
from paceline.configs.vocabulary import Completion, RolloutRequest
from paceline.controller.drafts.publisher import DraftPublisher, Subscription
from paceline.controller.engines.routing import Affinity, Demand, Load, demand_of, next_placement
from paceline.controller.engines.watching import TimeLimits, WatchedWorker, Worker
from paceline.controller.groups.buffer import WorkerLost
from paceline.controller.groups.concurrency import gather_or_cancel
from paceline.controller.groups.generation import sample_to_end
from paceline.weights_sync.handle import WeightHandle, WeightSyncError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Seat:
    """A worker's time in its place in the pool: a replacement begins anew, with the same index.

    ``served`` is what it acknowledged last; it ``joined`` when that was the current version. Where
    engines draft, ``subscription`` brings what others sampled.
    """

    index: int
    worker: WatchedWorker
    subscription: Subscription | None = None
    num_restarts: int = 0
    load: Load = field(default_factory=Load)
    served: WeightHandle | None = None
    joined: bool = False
    updating: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def serving(self) -> bool:
        """True while it is given requests."""
        return self.joined and self.worker.fate is None


@dataclass(eq=False)
class Ticket:
    """A request that waits for a worker; ``seat`` resolves to the one that then carries it."""

    demand: Demand
    seat: asyncio.Future[Seat]


class WorkerPool:
    """Workers of one model, and the spreading of requests over those at the current version.

    A worker serves from the moment it acknowledged the current version and its checksum. A lost one
    is replaced in its seat, at most ``max_restarts`` times, and brought to the current version
    before it gets requests again.

    A worker holds at most ``max_samples``, or one request. What it cannot take waits here, in no
    more places than there are callers: the loop's ``generate`` tasks, or an evaluation's prompts.

    Where engines draft, ``draft_publisher`` gets what was sampled where, and publishes it at each
    weight boundary.

    ``section`` of the configuration names the workers and is what messages tell a user to change.
    """

    def __init__(
        self,
        workers: list[Worker],
        start_worker: Callable[[int], Awaitable[Worker]],
        *,
        max_restarts: int,
        max_samples: int,
        limits: TimeLimits,
        section: str = "rollout",
        draft_publisher: DraftPublisher | None = None,
    ) -> None:
        self._start_worker = start_worker
        self._max_restarts = max_restarts
        self._max_samples = max_samples
        self._limits = limits
        self._section = section
        self._draft_publisher = draft_publisher
        self._affinity = Affinity()
        self._waiting: list[Ticket] = []
        self._restarts: set[asyncio.Task[None]] = set()
        self._current: WeightHandle | None = None
        self._failure: Exception | None = None
        self._seats = [self._seat(index, worker) for index, worker in enumerate(workers)]

    async def generate(self, request: RolloutRequest) -> tuple[Completion, ...]:
        """Sample on a serving worker; waits until one has room.

        Completions are unfinished where their segment ended first: by its length, a weight
        update, or because the worker held them too long.

        Raises:
            WorkerLost: the worker died or hangs; ask again, another will serve.
            ClusterError: workers were lost more often than they may be replaced.
        """
        return await self._generate(demand_of(request), request)

    async def generate_everywhere(self, request: RolloutRequest) -> list[tuple[Completion, ...]]:
        """Run the same request on every serving worker, to its end: for checks, not for training.

        A worker that is lost over it gives no answer.
        """
        answers: list[tuple[Completion, ...]] = []

        async def ask(index: int) -> None:
            def there(continued: RolloutRequest) -> Awaitable[tuple[Completion, ...]]:
                return self._generate(demand_of(continued, only=index), continued)

            with contextlib.suppress(WorkerLost):
                answers.append(await sample_to_end(there, request))

        await gather_or_cancel(*(ask(seat.index) for seat in self._seats if seat.serving))
        return answers

    async def update_weights(self, handle: WeightHandle) -> None:
        """Return once every live worker serves ``handle``; replacements catch up on their own.

        Raises:
            WeightSyncError: a worker acknowledged something else.
        """
        self._current = handle
        if self._draft_publisher is not None:
            self._draft_publisher.publish()
        await gather_or_cancel(*(self._bring_up_to_date(seat) for seat in self._seats))

    async def counters(self) -> list[dict[str, float]]:
        """Return running totals of every live worker's engine, in seat order."""

        async def ask(seat: Seat) -> dict[str, float] | None:
            with contextlib.suppress(WorkerLost):
                return await seat.worker.counters()
            return None

        answers = await gather_or_cancel(*(ask(seat) for seat in self._seats))
        return [answer for answer in answers if answer is not None]

    def states(self) -> dict[str, str]:
        """Describe what each worker is doing, in a few words."""
        served = "-" if self._current is None else f"v{self._current.version}"
        return {
            f"rollout {seat.index}": (
                f"{served}, {seat.load.samples} samples" if seat.serving else "restarting"
            )
            for seat in self._seats
        }

    async def close(self) -> None:
        """Stop every worker."""
        for restart in self._restarts:
            restart.cancel()
        for seat in self._seats:
            self._unsubscribe(seat)
        await asyncio.gather(*(seat.worker.close() for seat in self._seats))

    async def _generate(self, demand: Demand, request: RolloutRequest) -> tuple[Completion, ...]:
        seat = await self._take_seat(demand)
        try:
            answer = await seat.worker.generate(request)
        finally:
            self._leave(seat, demand)
        if answer.overdue:
            logger.info("%s is slow: took back %s", self._named(seat.index), request.request_id)
            self._affinity.remember(demand.prompt, seat.index, was_slow=True)
        if seat.subscription is not None:
            seat.subscription.add_sampled(request, answer.completions)
        return answer.completions

    async def _take_seat(self, demand: Demand) -> Seat:
        """Wait for a seat; its load includes the demand from the moment it was chosen."""
        if self._failure:
            raise self._failure
        ticket = Ticket(demand, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        self._dispatch()
        try:
            return await ticket.seat
        except asyncio.CancelledError:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._dispatch()
            elif not ticket.seat.cancelled() and ticket.seat.exception() is None:
                self._leave(ticket.seat.result(), demand)
            raise

    def _leave(self, seat: Seat, demand: Demand) -> None:
        seat.load -= demand.load
        self._dispatch()

    def _dispatch(self) -> None:
        """Give seats to all who need not wait."""
        while self._waiting:
            loads = {seat.index: seat.load for seat in self._seats if seat.serving}
            demands = (ticket.demand for ticket in self._waiting)
            found = next_placement(demands, loads, self._max_samples, self._affinity)
            if found is None:
                return
            position, index = found
            ticket, seat = self._waiting.pop(position), self._seats[index]
            if ticket.seat.cancelled():
                continue
            seat.load += ticket.demand.load
            self._affinity.remember(ticket.demand.prompt, index)
            ticket.seat.set_result(seat)

    async def _bring_up_to_date(self, seat: Seat) -> None:
        with contextlib.suppress(WorkerLost):
            await self._acknowledge(seat)

    async def _acknowledge(self, seat: Seat) -> None:
        """Update a seat's worker until it has what is current by then; it serves from there on."""
        async with seat.updating:
            while seat.served is not self._current:
                handle = self._current
                assert handle is not None, "weights are never taken back"
                answer = await seat.worker.update_weights(handle)
                if answer != (handle.version, handle.checksum):
                    raise WeightSyncError(
                        f"worker {seat.index} acknowledged version {answer[0]} with checksum "
                        f"{answer[1] or 0:016x}, expected {handle.version} with "
                        f"{handle.checksum:016x}"
                    )
                seat.served = handle
        seat.joined = seat.served is not None
        if seat.subscription is not None:
            seat.subscription.start_delivery()
        self._dispatch()

    def _named(self, index: int) -> str:
        return f"{self._section} worker {index}"

    def _seat(self, index: int, worker: Worker, num_restarts: int = 0) -> Seat:
        name, on_lost = self._named(index), functools.partial(self._replace, index)
        watched = WatchedWorker(worker, name, self._limits, on_lost)
        publisher = self._draft_publisher
        subscription = None if publisher is None else publisher.subscribe(watched)
        return Seat(index, watched, subscription, num_restarts)

    def _unsubscribe(self, seat: Seat) -> None:
        if seat.subscription is not None:
            seat.subscription.cancel()

    def _replace(self, index: int) -> None:
        """Start a replacement for the worker that was just found lost."""
        seat = self._seats[index]
        self._unsubscribe(seat)
        lost = WorkerLost(f"{self._named(index)} {seat.worker.fate}")
        self._turn_away(lost, [ticket for ticket in self._waiting if ticket.demand.only == index])
        restart = asyncio.create_task(self._restart(seat), name=f"restart-worker-{index}")
        self._restarts.add(restart)
        restart.add_done_callback(self._restarts.discard)

    async def _restart(self, lost: Seat) -> None:
        index, num_restarts = lost.index, lost.num_restarts + 1
        try:
            if num_restarts > self._max_restarts:
                raise ClusterError(
                    f"{self._named(index)} died {times(num_restarts)} and "
                    f"{self._section}.max_restarts is {self._max_restarts}: "
                    f"{advice(lost.worker, self._section)}"
                )
            logger.warning("%s %s: starting another", self._named(index), lost.worker.fate)
            await lost.worker.close()
            worker = await self._start_worker(index)
            self._seats[index] = self._seat(index, worker, num_restarts)
            await self._acknowledge(self._seats[index])
            logger.warning("%s serves again", self._named(index))
        except WorkerLost:
            pass  # the replacement's own loss has it replaced
        except Exception as error:
            self._failure = error
            self._turn_away(error, list(self._waiting))

    def _turn_away(self, error: Exception, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self._waiting.remove(ticket)
            if not ticket.seat.cancelled():
                ticket.seat.set_exception(error)


def times(count: int) -> str:
    """Spell how often something happened."""
    return "once" if count == 1 else f"{count} times"


def advice(worker: WatchedWorker, section: str) -> str:
    """Tell what to do about a worker that was lost once too often."""
    if worker.fate == "died":
        return (
            f"its log says why; if memory ran out, lower {section}.max_num_seqs or "
            f"{section}.kv_cache_mb"
        )
    return (
        f"it {worker.fate}; if it was only slow, raise {section}.answer_seconds, or "
        f"{section}.claim_seconds where that is longer"
    )
