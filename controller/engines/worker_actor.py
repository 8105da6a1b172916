"""Ray actors of a run and the plain objects the controller talks to instead of them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from paceline.configs.errors import ClusterError, UserError
from paceline.configs.vocabulary import Completion, RolloutRequest
from paceline.controller.parts import WorkerLost
from paceline.weights_sync.handle import Acknowledgement, WeightHandle

T = TypeVar("T")

SAVE_MEMORY = "lower learner.tokens_per_microbatch, rollout.max_num_seqs or rollout.kv_cache_mb"

CONTROL_CALLS = 16
"""Calls a rollout worker has room for at a time, beside requests and their interruptions."""


@dataclass(frozen=True)
class LateClass:
    """A class by its import path, imported where it is called: in the process that needs it."""

    path: str

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Import the class and construct it."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)(*arguments, **keywords)


def start_actor(
    actor_class: Callable[..., Any],
    *arguments: Any,
    cpus: float,
    gpus: float,
    environment: Mapping[str, str],
    **options: Any,
) -> Any:
    """Start an actor with its resources reserved; return Ray's handle."""
    options |= {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": dict(environment)}}
    return ray.remote(actor_class).options(**options).remote(*arguments)


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

    ``worker_class`` is `RolloutWorker`, which this room does not know.

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


async def result_of(reference: Awaitable[T], dead: type[Exception], who: str) -> T:
    """Await an actor's answer; a dead actor raises ``dead``, a user's mistake is raised as itself.

    Raises:
        ClusterError: the actor ran out of memory.
    """
    try:
        return await reference
    except RayActorError as error:
        raise dead(
            f"{who} died ({one_line(error)}): if memory ran out, {SAVE_MEMORY}; "
            "--resume continues from the last checkpoint"
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        if is_out_of_memory(error.cause):
            raise ClusterError(
                f"{who} ran out of memory ({one_line(error.cause)}): {SAVE_MEMORY}"
            ) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's and numpy's error, torch's on GPU, torch's on CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def one_line(error: BaseException) -> str:
    """The beginning of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class RolloutActor:
    """A `RolloutWorker` actor as a `Worker`: its death becomes `WorkerLost`."""

    section = "rollout"
    """The section of the configuration that its engine is of."""

    def __init__(self, actor: ActorHandle, index: int) -> None:
        self._actor = actor
        self._who = self.named(index)

    @classmethod
    def named(cls, index: int) -> str:
        """What a worker is called in messages."""
        return f"{cls.section} worker {index}"

    async def generate(self, request: RolloutRequest) -> tuple[Completion, ...]:
        """All completions of a request, unfinished ones where its turn ended first."""
        return await self._call(self._actor.generate.remote(request))

    async def interrupt(self, request_id: str) -> bool:
        """Have a pending request answered now, with what there is; False: it is not there."""
        return await self._call(self._actor.interrupt.remote(request_id))

    async def update_weights(self, handle: WeightHandle) -> Acknowledgement:
        """Load a version; return what the engine serves then."""
        return await self._call(self._actor.update_weights.remote(handle))

    async def learn(self, block: Any, reader: int) -> None:
        """Have it draft from a published block of traces, but for the reader's own."""
        await self._call(self._actor.learn.remote(block, reader))

    async def counters(self) -> dict[str, float]:
        """Running totals of its engine."""
        return await self._call(self._actor.counters.remote())

    async def close(self) -> None:
        """Stop the actor; one that is already dead is fine."""
        await asyncio.to_thread(kill, self._actor)

    async def _call(self, reference: Awaitable[T]) -> T:
        return await result_of(reference, WorkerLost, self._who)


def kill(actor: ActorHandle) -> None:
    """End an actor's process; one that is gone already is fine."""
    with contextlib.suppress(Exception):
        ray.kill(actor)
