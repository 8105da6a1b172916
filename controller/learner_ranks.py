"""The learner's ranks: actors that are called together, and the object in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from paceline.configs.errors import ClusterError
from paceline.configs.schema.learner import OptimizerConfig
from paceline.configs.vocabulary import StepReport, TrainBatch, WeightVersion
from paceline.controller.actors import ActorHost, kill, result_of, start_actor
from paceline.controller.checkpoints import Finish
from paceline.controller.parts import Algorithm
from paceline.weights_sync.handle import WeightHandle


class RankHost(ActorHost):
    """The host of one rank: its calls run one after the other on a thread of their own, so that
    the process answers while one of them runs."""

    def __init__(self) -> None:
        self._calls = ThreadPoolExecutor(1, thread_name_prefix="calls")

    async def build(self, factory: Callable[[], Any]) -> None:
        """Build the rank on the thread that will run its calls: torch keeps settings by thread."""
        await self._on_thread(self._build, factory)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method after the calls before it."""
        return await self._on_thread(getattr(self._object, method), *arguments)

    async def call_beside(self, method: str, *arguments: Any) -> Any:
        """Call a method while others run."""
        return await asyncio.to_thread(getattr(self._object, method), *arguments)

    def _build(self, factory: Callable[[], Any]) -> None:
        self._object = factory()

    async def _on_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        running = asyncio.get_running_loop()
        return await running.run_in_executor(self._calls, functools.partial(function, *arguments))


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
    actors = [start_actor(cpus, gpus, environment, RankHost) for _ in range(num_ranks)]
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

    async def save(self, folder: str) -> Finish:
        """Begin to write model and optimiser, sharded, for `load`; returns what waits for it."""
        await self._call("save", folder)
        return self._finish_save

    async def _finish_save(self) -> None:
        await self._call("finish_save", beside=True)

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

    async def _call(self, method: str, *arguments: Any, beside: bool = False) -> Any:
        """Call every rank; the first failure ends the wait, for the others hang in a collective.

        A call ``beside`` the others does not wait for those before it.
        """
        calls = [
            asyncio.ensure_future(
                result_of(
                    (actor.call_beside if beside else actor.call).remote(method, *arguments),
                    ClusterError,
                    f"learner rank {rank}",
                )
            )
            for rank, actor in enumerate(self._actors)
        ]
        try:
            return (await asyncio.gather(*calls))[0]
        finally:
            for call in calls:
                call.cancel()
