"""A rollout worker's actor, and the plain object the pool talks to instead of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from ray.actor import ActorHandle

from paceline.configs.errors import ClusterError
from paceline.configs.vocabulary import Completion, RolloutRequest
from paceline.controller.cluster.actors import kill, result_of, start_actor
from paceline.controller.groups.buffer import WorkerLost
from paceline.weights_sync.handle import Acknowledgement, WeightHandle

T = TypeVar("T")
CONTROL_CALLS = 16
"""Calls a rollout worker has room for at a time, beside requests and their interruptions."""


async def start_rollout_worker(
    index: int,
    worker_class: Callable[[Callable[[], Any]], Any],
    build_engine: Callable[[], Any],
    *,
    cpus: float,
    gpus: float,
    environment: Mapping[str, str],
    max_requests: int,
    handle_class: type[RolloutActor] | None = None,
) -> RolloutActor:
    """Start a rollout worker for ``max_requests`` at a time; returns once its engine is up.

    ``worker_class`` is `RolloutWorker`, which this package must not import.

    Raises:
        UserError: the engine cannot be built as configured.
        ClusterError: its process died.
    """
    handle_class = handle_class or RolloutActor
    actor = start_actor(
        worker_class,
        build_engine,
        cpus=cpus,
        gpus=gpus,
        environment=environment,
        # Ray makes calls beyond its limit wait: an interrupt must not wait for what it interrupts.
        max_concurrency=2 * max_requests + CONTROL_CALLS,
    )
    try:
        await result_of(actor.ready.remote(), ClusterError, handle_class.named(index))
    except BaseException:
        kill(actor)
        raise
    return handle_class(actor, index)


class RolloutActor:
    """A `RolloutWorker` actor as a `Worker`: its death becomes `WorkerLost`."""

    section = "rollout"
    """The section of the configuration that its engine is of."""

    def __init__(self, actor: ActorHandle, index: int) -> None:
        self._actor = actor
        self._who = self.named(index)

    @classmethod
    def named(cls, index: int) -> str:
        """Return a worker's name in messages."""
        return f"{cls.section} worker {index}"

    async def generate(self, request: RolloutRequest) -> tuple[Completion, ...]:
        """Return all completions of a request, unfinished ones where their segment ended first."""
        return await self._call(self._actor.generate.remote(request))

    async def interrupt(self, request_id: str) -> bool:
        """Have a pending request answered now, with what there is; False: it is not there."""
        return await self._call(self._actor.interrupt.remote(request_id))

    async def update_weights(self, handle: WeightHandle) -> Acknowledgement:
        """Load a version; return what the engine serves then."""
        return await self._call(self._actor.update_weights.remote(handle))

    async def add_draft_text(self, block: Any, subscriber: int) -> None:
        """Have it draft from a published block, but for the subscriber's own texts."""
        await self._call(self._actor.add_draft_text.remote(block, subscriber))

    async def counters(self) -> dict[str, float]:
        """Return running totals of its engine."""
        return await self._call(self._actor.counters.remote())

    async def close(self) -> None:
        """Stop the actor; one that is already dead is fine."""
        await asyncio.to_thread(kill, self._actor)

    async def _call(self, reference: Awaitable[T]) -> T:
        return await result_of(reference, WorkerLost, self._who)
