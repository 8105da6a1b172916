"""Ray actors of a run and the plain objects the controller talks to instead of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
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
from paceline.controller.parts import Loss, WorkerLost
from paceline.weights_sync.handle import WeightHandle

T = TypeVar("T")


async def result_of(reference: Awaitable[T], dead: type[Exception], who: str) -> T:
    """Await an actor's answer; a dead actor raises ``dead``, its own error is raised as itself."""
    try:
        return await reference
    except RayActorError as error:
        reason = str(error).strip().splitlines()
        raise dead(f"{who} died: {reason[0] if reason else type(error).__name__}") from error
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


class RolloutActor:
    """A `RolloutWorker` actor as a `Worker`: its death becomes `WorkerLost`."""

    def __init__(self, actor: ActorHandle, index: int) -> None:
        self._actor = actor
        self._who = f"rollout worker {index}"

    async def generate(self, request: RolloutRequest) -> tuple[Completion, ...]:
        """All completions of a request."""
        return await self._call(self._actor.generate.remote(request))

    async def update_weights(self, handle: WeightHandle) -> tuple[WeightVersion, int]:
        """Load a version; answers what is then served."""
        return await self._call(self._actor.update_weights.remote(handle))

    async def counters(self) -> dict[str, float]:
        """Running totals of its engine."""
        return await self._call(self._actor.counters.remote())

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

    def __init__(
        self, actors: list[ActorHandle], optimizer: OptimizerConfig, num_steps: int
    ) -> None:
        self._actors = actors
        self.optimizer = optimizer
        self.num_steps = num_steps

    def planned(self, optimizer: OptimizerConfig, num_steps: int) -> LearnerRanks:
        """The same ranks under another optimiser plan."""
        return LearnerRanks(self._actors, optimizer, num_steps)

    async def forward_backward(self, batch: TrainBatch, loss: Loss) -> StepReport:
        """Accumulate the gradients of a whole batch over all ranks."""
        reference = ray.put(batch)
        return await self._call("forward_backward", reference, loss)

    async def optimizer_step(self, step: int, report: StepReport) -> StepReport:
        """Apply the gradients: version ``step`` becomes ``step + 1``."""
        metrics = await self._call("optimizer_step", step + 1, self.optimizer, step, self.num_steps)
        return StepReport(
            version=WeightVersion(step + 1),
            num_tokens=report.num_tokens,
            num_trained_tokens=report.num_trained_tokens,
            num_padding_tokens=report.num_padding_tokens,
            seconds=report.seconds,
            metrics={**report.metrics, **metrics},
        )

    async def publish(self, version: int) -> WeightHandle:
        """Write a version where engines can read it."""
        return await self._call("publish", version)

    async def reset_optimizer(self) -> None:
        """Forget moments: between the warm start and reinforcement learning."""
        await self._call("reset_optimizer")

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
                    getattr(actor, method).remote(*arguments), ClusterError, f"learner rank {rank}"
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
