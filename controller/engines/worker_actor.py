"""Ray actors of a run and the plain objects the controller talks to instead of them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from paceline.configs.errors import ClusterError, UserError
from paceline.configs.vocabulary import Completion, RolloutRequest, WeightVersion
from paceline.controller.parts import WorkerLost
from paceline.weights_sync.handle import WeightHandle

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


class ActorHost:
    """The actor class of every actor: holds one object in its process and carries calls to it.

    The object is built by a call, not by the actor's constructor: Ray would turn an error of the
    latter into text, and a user's mistake must arrive as the error it is.
    """

    async def build(self, factory: Callable[[], Any]) -> None:
        """Build the object this process is for."""
        self._object = factory()

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object; coroutines of several calls run side by side."""
        result = getattr(self._object, method)(*arguments)
        return await result if inspect.isawaitable(result) else result

    def address(self) -> tuple[str, int]:
        """This node's address and a port that was free a moment ago."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]


def start_actor(
    cpus: float,
    gpus: float,
    environment: Mapping[str, str],
    host: type[ActorHost] = ActorHost,
    **options: Any,
) -> Any:
    """Start an empty host with its resources reserved; returns Ray's handle."""
    return (
        ray.remote(host)
        .options(
            num_cpus=cpus, num_gpus=gpus, runtime_env={"env_vars": dict(environment)}, **options
        )
        .remote()
    )


async def start_rollout_worker(
    index: int,
    factory: Callable[[], Any],
    *,
    cpus: float,
    gpus: float,
    environment: Mapping[str, str],
    max_requests: int,
    actor_class: type[RolloutActor] | None = None,
) -> RolloutActor:
    """Start a rollout worker for ``max_requests`` at a time; returns once its engine is up.

    Raises:
        UserError: the engine cannot be built as configured.
        ClusterError: its process died.
    """
    # Ray makes calls beyond its limit wait: an interrupt must not wait for what it interrupts.
    max_concurrency = 2 * max_requests + CONTROL_CALLS
    actor_class = actor_class or RolloutActor
    actor = start_actor(cpus, gpus, environment, max_concurrency=max_concurrency)
    try:
        await result_of(actor.build.remote(factory), ClusterError, actor_class.named(index))
    except BaseException:
        kill(actor)
        raise
    return actor_class(actor, index)


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
        """Return all completions of a request, unfinished ones where their segment ended first."""
        return await self._call(self._actor.call.remote("generate", request))

    async def interrupt(self, request_id: str) -> bool:
        """Have a pending request answered now, with what there is; False: it is not there."""
        return await self._call(self._actor.call.remote("interrupt", request_id))

    async def update_weights(self, handle: WeightHandle) -> tuple[WeightVersion, int]:
        """Load a version; answers what is then served."""
        return await self._call(self._actor.call.remote("update_weights", handle))

    async def add_draft_text(self, block: Any, subscriber: int) -> None:
        """Have it draft from a published block, but for the subscriber's own texts."""
        await self._call(self._actor.call.remote("add_draft_text", block, subscriber))

    async def counters(self) -> dict[str, float]:
        """Running totals of its engine."""
        return await self._call(self._actor.call.remote("counters"))

    async def close(self) -> None:
        """Stop the actor; one that is already dead is fine."""
        await asyncio.to_thread(kill, self._actor)

    async def _call(self, reference: Awaitable[T]) -> T:
        return await result_of(reference, WorkerLost, self._who)


def kill(actor: ActorHandle) -> None:
    """End an actor's process; one that is gone already is fine."""
    with contextlib.suppress(Exception):
        ray.kill(actor)
