"""Supervision of a rollout worker: each call ends in time, with its answer or `WorkerLost`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from paceline.configs.vocabulary import Completion, RolloutRequest
from paceline.controller.groups.buffer import WorkerLost
from paceline.weights_sync.handle import Acknowledgement, WeightHandle

T = TypeVar("T")


class Worker(Protocol):
    """A rollout worker as the controller sees it; once dead, its calls raise `WorkerLost`."""

    async def generate(self, request: RolloutRequest) -> tuple[Completion, ...]:
        """Return all completions of a request once each ended its segment, in sample order."""

    async def interrupt(self, request_id: str) -> bool:
        """Have a pending `generate` answered now, with what there is; False: it is not here."""

    async def update_weights(self, handle: WeightHandle) -> Acknowledgement:
        """Load a version; return what the engine serves then."""

    async def add_draft_text(self, block: Any, subscriber: int) -> None:
        """Draft from a published block but for the subscriber's own; see `DraftPublisher`."""

    async def counters(self) -> dict[str, float]:
        """Return running totals of its engine."""

    async def close(self) -> None:
        """End it, even if it hangs; never raises."""


@dataclass(frozen=True)
class TimeLimits:
    """Longest a worker may hold a request, and longest it may owe a sign of life; in seconds."""

    claim_seconds: float
    answer_seconds: float

    @property
    def update_seconds(self) -> float:
        """Longest it may take to load weights, which for a large model is long."""
        return max(self.claim_seconds, self.answer_seconds)


@dataclass(frozen=True)
class Answer:
    """Completions of a request; ``overdue`` if a slow worker was interrupted."""

    completions: tuple[Completion, ...]
    overdue: bool


class WatchedWorker:
    """A worker that counts as lost once it leaves a call unanswered for too long.

    - Its process owes a sign of life, asked for every half ``answer_seconds``, within as long.
    - ``generate`` may take ``claim_seconds``. Then the worker is interrupted, and must answer with
      what there is: the interrupt and the request, each within ``answer_seconds``.
    - ``update_weights`` may take the longer of both; so may an interrupt meanwhile, which the
      engine sees only afterwards.

    So a process that hangs or died is found within ``answer_seconds``, whatever is asked of it. An
    engine stuck in a living process is found within ``claim_seconds + 2 answer_seconds``, or the
    longer of both where weights were to be loaded. Once lost, all calls raise `WorkerLost`, pending
    ones at once, and ``on_lost`` has been called, once.
    """

    def __init__(
        self, worker: Worker, name: str, limits: TimeLimits, on_lost: Callable[[], None]
    ) -> None:
        self._worker = worker
        self._name = name
        self._limits = limits
        self._on_lost = on_lost
        self._is_updating = False
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._send(self._watch(), "watch")

    @property
    def fate(self) -> str | None:
        """The way it was lost; None while it lives."""
        return self._lost.result() if self._lost.done() else None

    async def generate(self, request: RolloutRequest) -> Answer:
        """Return completions of a request, unfinished ones if it took too long.

        A request whose caller gave up is interrupted, so that it holds up no other.

        Raises:
            WorkerLost: it is lost, or was before.
        """
        call = asyncio.ensure_future(self._worker.generate(request))
        try:
            if await self._has_answered(call, self._limits.claim_seconds):
                return Answer(self._result(call), overdue=False)
            limit = self._limits.update_seconds if self._is_updating else None
            await self._answer(self._worker.interrupt(request.request_id), "an interrupt", limit)
            return Answer(await self._answer(call, "an interrupted request"), overdue=True)
        except asyncio.CancelledError:
            self._send(self._interrupt(request.request_id), "interrupt")
            raise
        finally:
            call.cancel()

    async def update_weights(self, handle: WeightHandle) -> Acknowledgement:
        """Load a version; return what the engine serves then.

        Raises:
            WorkerLost: it is lost, or was before.
        """
        self._is_updating = True
        try:
            update = self._worker.update_weights(handle)
            return await self._answer(update, "a weight update", self._limits.update_seconds)
        finally:
            self._is_updating = False

    async def add_draft_text(self, block: Any, subscriber: int) -> None:
        """Draft from a published block but for the subscriber's own texts.

        Raises:
            WorkerLost: it is lost, or was before.
        """
        addition = self._worker.add_draft_text(block, subscriber)
        await self._answer(addition, "a block of draft text", self._limits.update_seconds)

    async def counters(self) -> dict[str, float]:
        """Return running totals of its engine.

        Raises:
            WorkerLost: it is lost, or was before.
        """
        return await self._answer(self._worker.counters(), "a look at its counters")

    async def close(self) -> None:
        """End it; pending calls raise `WorkerLost`, and ``on_lost`` is not called."""
        if not self._lost.done():
            self._lost.set_result("was closed")
        for task in self._tasks:
            task.cancel()
        await self._worker.close()

    async def _watch(self) -> None:
        """Ask for signs of life until one fails to come."""
        half = self._limits.answer_seconds / 2
        with contextlib.suppress(WorkerLost):
            while True:
                await asyncio.wait((self._lost,), timeout=half)
                await self._answer(self._worker.counters(), "a sign of life", half)

    async def _interrupt(self, request_id: str) -> None:
        with contextlib.suppress(WorkerLost):
            await self._answer(
                self._worker.interrupt(request_id), "an interrupt", self._limits.update_seconds
            )

    async def _answer(self, call: Awaitable[T], what: str, limit: float | None = None) -> T:
        """Return the answer; a worker that takes over ``limit`` (``answer_seconds``) is lost."""
        seconds = limit or self._limits.answer_seconds
        task = asyncio.ensure_future(call)
        try:
            if not await self._has_answered(task, seconds):
                raise self._loss(f"hangs, it left {what} unanswered for {seconds:g} s")
            return self._result(task)
        finally:
            task.cancel()

    async def _has_answered(self, call: asyncio.Future[Any], seconds: float) -> bool:
        """Wait at most ``seconds`` for an answer.

        In two parts: where it was this process that stood still (Ctrl-Z, a long computation), the
        first is over when it wakes, and the second is time to read what has arrived meanwhile.

        Raises:
            WorkerLost: it was lost before it answered.
        """
        both = (call, self._lost)
        for part in (0.75 * seconds, 0.25 * seconds):
            await asyncio.wait(both, timeout=part, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                return True
            if self.fate is not None:
                raise self._loss(self.fate)
        return False

    def _result(self, call: asyncio.Future[T]) -> T:
        try:
            return call.result()
        except WorkerLost as error:
            raise self._loss("died") from error

    def _loss(self, fate: str) -> WorkerLost:
        """Return what to raise; the first to find the worker lost says how."""
        if not self._lost.done():
            self._lost.set_result(fate)
            self._on_lost()
        return WorkerLost(f"{self._name} {self.fate}")

    def _send(self, coroutine: Coroutine[Any, Any, None], what: str) -> None:
        task = asyncio.create_task(coroutine, name=f"{what}: {self._name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
