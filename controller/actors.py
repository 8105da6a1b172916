"""Ray actors of a run and the plain objects the controller talks to instead of them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import inspect
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from paceline.configs.errors import ClusterError, UserError
from paceline.configs.schema.learner import OptimizerConfig
from paceline.configs.vocabulary import (
    Completion,
    RolloutRequest,
    StepReport,
    TrainBatch,
    WeightVersion,
)
from paceline.controller.parts import Algorithm, WorkerLost
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

    def build(self, factory: Callable[[], Any]) -> None:
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


def start_actor(cpus: float, gpus: float, environment: Mapping[str, str], **options: Any) -> Any:
    """Start an empty host with its resources reserved; returns Ray's handle."""
    return (
        ray.remote(ActorHost)
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


async def start_learner_ranks(
    factory: Callable[..., Any],
    num_ranks: int,
    *,
    cpus: float,
    gpus: float,
    environment: Mapping[str, str],
) -> LearnerRanks:
    """Start the learner's ranks, joined in one process group; returns once all hold the model.

    ``factory`` takes ``rank`` and ``rendezvous`` (``tcp://host:port`` of rank 0's node, or None for
    a single rank).

    Raises:
        UserError: the model cannot be built as configured.
        ClusterError: a rank's process died.
    """
    actors = [start_actor(cpus, gpus, environment) for _ in range(num_ranks)]
    try:
        rendezvous = None
        if num_ranks > 1:
            host, port = await result_of(actors[0].address.remote(), ClusterError, "learner rank 0")
            rendezvous = f"tcp://{host}:{port}"
        builds = (
            result_of(
                actor.build.remote(functools.partial(factory, rank=rank, rendezvous=rendezvous)),
                ClusterError,
                f"learner rank {rank}",
            )
            for rank, actor in enumerate(actors)
        )
        await asyncio.gather(*builds)
    except BaseException:
        for actor in actors:
            kill(actor)
        raise
    return LearnerRanks(actors)


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
        return await self._call(self._actor.call.remote("generate", request))

    async def interrupt(self, request_id: str) -> bool:
        """Have a pending request answered now, with what there is; False: it is not there."""
        return await self._call(self._actor.call.remote("interrupt", request_id))

    async def update_weights(self, handle: WeightHandle) -> tuple[WeightVersion, int]:
        """Load a version; answers what is then served."""
        return await self._call(self._actor.call.remote("update_weights", handle))

    async def learn(self, block: Any, reader: int) -> None:
        """Have it draft from a published block of traces, but for the reader's own."""
        await self._call(self._actor.call.remote("learn", block, reader))

    async def counters(self) -> dict[str, float]:
        """Running totals of its engine."""
        return await self._call(self._actor.call.remote("counters"))

    async def close(self) -> None:
        """Stop the actor; one that is already dead is fine."""
        await asyncio.to_thread(kill, self._actor)

    async def _call(self, reference: Awaitable[T]) -> T:
        return await result_of(reference, WorkerLost, self._who)


class LearnerRanks:
    """All learner ranks as one `Learner`: each call goes to every rank, rank 0 speaks for them.

    Rank r takes its own share of a batch; gradients are summed over ranks inside the call. A dead
    rank ends the run with `ClusterError`: the others cannot go on without it.
    """

    def __init__(self, actors: Sequence[ActorHandle]) -> None:
        self._actors = actors
        self._plan: tuple[OptimizerConfig, int] | None = None

    async def begin(self, optimizer: OptimizerConfig, num_steps: int) -> None:
        """Start a phase of ``num_steps`` steps: its own optimiser settings, fresh moments."""
        self._plan = (optimizer, num_steps)
        await self._call("reset_optimizer")

    async def forward_backward(self, batch: TrainBatch, algorithm: Algorithm) -> StepReport:
        """Find what a batch's tokens are worth, and its first update's gradients over all ranks."""
        # Put once, read by every rank: Ray resolves the reference before it calls.
        return await self._call("forward_backward", ray.put(batch), algorithm)

    async def optimizer_step(self, step: int, report: StepReport) -> StepReport:
        """Apply the batch's updates: version ``step`` becomes ``step + 1``."""
        assert self._plan is not None, "begin() comes before the first step"
        optimizer, num_steps = self._plan
        metrics = await self._call("optimizer_step", step + 1, optimizer, step, num_steps)
        return replace(
            report, version=WeightVersion(step + 1), metrics={**report.metrics, **metrics}
        )

    async def publish(self, version: int) -> WeightHandle:
        """Write a version where engines can read it."""
        return await self._call("publish", version)

    async def load_reference(self, folder: str, offload: bool) -> None:
        """Hold the policy of a folder as the frozen reference."""
        await self._call("load_reference", folder, offload)

    async def save(self, folder: str) -> None:
        """Write model and optimiser, sharded, for `load`."""
        await self._call("save", folder)

    async def load(self, folder: str) -> None:
        """Read what `save` wrote, by any number of ranks."""
        await self._call("load", folder)

    async def export(self, folder: str) -> None:
        """Write the model in Hugging Face format."""
        await self._call("export", folder)

    async def greedy_mismatches(
        self, sequences: list[tuple[np.ndarray, int]], tolerance: float
    ) -> int:
        """How many completion tokens are not the argmax of the learner's own forward pass."""
        return await self._call("greedy_mismatches", sequences, tolerance)

    async def close(self) -> None:
        """Stop every rank; dead ones are fine."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._call("close"), timeout=10)
        for actor in self._actors:
            await asyncio.to_thread(kill, actor)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Call every rank; the first failure ends the wait, for the others hang in a collective."""
        calls = [
            asyncio.ensure_future(
                result_of(
                    actor.call.remote(method, *arguments), ClusterError, f"learner rank {rank}"
                )
            )
            for rank, actor in enumerate(self._actors)
        ]
        try:
            return (await asyncio.gather(*calls))[0]
        finally:
            for call in calls:
                call.cancel()


def kill(actor: ActorHandle) -> None:
    """End an actor's process; one that is gone already is fine."""
    with contextlib.suppress(Exception):
        ray.kill(actor)
