"""The learner's ranks: actors that are called together, and the object in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from paceline.configs.errors import ClusterError, UserError
from paceline.configs.schema.learner import OptimizerConfig
from paceline.configs.vocabulary import Group, StepReport, TrainBatch, WeightVersion
from paceline.controller.cluster.actors import kill, result_of, start_actor
from paceline.controller.cluster.placement import Placement, in_bundle, release, reserve
from paceline.controller.parts import Algorithm, Finish
from paceline.controller.ranks.hangs import Hang, HangWatch, RankStatus
from paceline.controller.ranks.rank import Rank
from paceline.controller.ranks.rank_host import RankHost
from paceline.weights_sync.handle import WeightHandle

P = ParamSpec("P")
T = TypeVar("T")


LOOKS = 4
"""Looks at the ranks in the time after which a hang is one."""
LOOK_SECONDS = 5.0
"""How long ranks have to say where they are once one of them failed."""


async def start_learner_ranks(
    factory: Callable[..., Any],
    num_ranks: int,
    *,
    cpus: float,
    gpus: float,
    environment: Mapping[str, str],
    hang_seconds: float,
    reports: Path,
    placement: Placement = "pack",
) -> LearnerRanks:
    """Start the learner's ranks, joined in one process group; returns once all hold the model.

    ``factory`` takes ``rank`` and ``rendezvous`` (``tcp://host:port`` of rank 0's node, or None for
    a single rank). Ranks that keep others waiting for ``hang_seconds`` are named, and what all
    ranks were doing then is written to a file in the folder ``reports``.

    Raises:
        UserError: the model cannot be built as configured.
        ClusterError: a rank's process died, or no nodes have room for them.
    """
    room = await reserve(num_ranks, cpus, gpus, placement)
    actors = [
        start_actor(
            RankHost, cpus=cpus, gpus=gpus, environment=environment, **in_bundle(room, rank)
        )
        for rank in range(num_ranks)
    ]
    try:
        rendezvous = None
        if num_ranks > 1:
            host, port = await result_of(actors[0].address.remote(), ClusterError, named(0))
            rendezvous = f"tcp://{host}:{port}"
        builds = (
            result_of(
                actor.build.remote(functools.partial(factory, rank=rank, rendezvous=rendezvous)),
                ClusterError,
                named(rank),
            )
            for rank, actor in enumerate(actors)
        )
        await asyncio.gather(*builds)
    except BaseException:
        for actor in actors:
            kill(actor)
        release(room)
        raise
    return LearnerRanks(actors, hang_seconds, reports, room)


class LearnerRanks:
    """All learner ranks as one: each call goes to every rank, rank 0 speaks for them.

    Rank r takes its own share of a batch; gradients are summed over ranks inside the call. A dead
    or hanging rank ends the run with a `ClusterError` that names it: the others cannot go on
    without it, and every later call raises the same.
    """

    def __init__(
        self,
        actors: Sequence[ActorHandle],
        hang_seconds: float,
        reports: Path,
        room: PlacementGroup | None = None,
    ) -> None:
        self._actors = actors
        self._hang_seconds = hang_seconds
        self._reports = reports
        self._room = room
        self._lost: ClusterError | None = None

    async def begin(self, optimizer: OptimizerConfig, num_steps: int) -> LearnerPhase:
        """Start a phase of ``num_steps`` steps: its own optimiser settings, fresh moments."""
        await self.call(Rank.reset_optimizer)
        return LearnerPhase(self, optimizer, num_steps)

    async def publish(self, version: int) -> WeightHandle:
        """Write a version where engines can read it."""
        handle = await self.call(Rank.publish, version)
        assert handle is not None, "rank 0 announces"
        return handle

    async def load_reference(self, folder: str, offload: bool) -> None:
        """Hold the policy of a folder as the frozen reference."""
        await self.call(Rank.load_reference, folder, offload)

    async def save(self, folder: str) -> Finish:
        """Begin to write model and optimiser, sharded, for `load`; returns what waits for it."""
        await self.call(Rank.save, folder)
        return self._finish_save

    async def _finish_save(self) -> None:
        await self._watched(Rank.finish_save.__name__, (), beside=True)

    async def load(self, folder: str) -> None:
        """Read what `save` wrote, by any number of ranks."""
        await self.call(Rank.load, folder)

    async def export(self, folder: str) -> None:
        """Write the model in Hugging Face format."""
        await self.call(Rank.export, folder)

    async def greedy_mismatches(self, groups: Sequence[Group], tolerance: float) -> int:
        """Count completion tokens that are not the argmax of the learner's own forward pass."""
        return await self.call(Rank.greedy_mismatches, groups, tolerance)

    async def close(self) -> None:
        """Stop every rank; dead ones are fine."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.call(Rank.close), timeout=10)
        for actor in self._actors:
            await asyncio.to_thread(kill, actor)
        release(self._room)

    async def call(
        self, method: Callable[Concatenate[Any, P], T], *arguments: P.args, **_: P.kwargs
    ) -> T:
        """Call a method of `Rank` on every rank; return rank 0's answer.

        Arguments may be references to objects in Ray's store.
        """
        answer: T = await self._watched(method.__name__, arguments)
        return answer

    async def _watched(
        self, method: str, arguments: tuple[Any, ...], *, beside: bool = False
    ) -> Any:
        """Call every rank and watch them meanwhile; return rank 0's answer.

        The first failure ends the wait, for the others hang in a collective. A call ``beside`` the
        others does not wait for those before it.
        """
        if self._lost is not None:
            raise self._lost
        answers = asyncio.ensure_future(self._answers(method, arguments, beside))
        watch = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait((answers, watch), return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                return answers.result()[0]
            raise watch.result()
        except ClusterError as error:
            self._lost = error
            raise
        except UserError:
            raise
        except Exception as error:
            await self._blame_the_dead(error)
            raise
        finally:
            answers.cancel()
            watch.cancel()

    async def _answers(self, method: str, arguments: tuple[Any, ...], beside: bool) -> list[Any]:
        calls = [
            asyncio.ensure_future(
                result_of(
                    (actor.call_beside if beside else actor.call).remote(method, *arguments),
                    ClusterError,
                    named(rank),
                )
            )
            for rank, actor in enumerate(self._actors)
        ]
        try:
            return await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()

    async def _watch(self) -> ClusterError:
        """Look at the ranks again and again; returns once one of them hangs, with what to raise."""
        watch, interval = HangWatch(self._hang_seconds), self._hang_seconds / LOOKS
        clock, now = asyncio.get_running_loop().time, 0.0
        while True:
            began = clock()
            await asyncio.sleep(interval)
            look = await self._look(interval)
            # a controller that stood still itself (Ctrl-Z) has not waited for them all that time
            now += min(clock() - began, 2 * interval)
            answered = {r: s if isinstance(s, RankStatus) else None for r, s in look.items()}
            if self._lost is not None:  # another call's watch was first
                return self._lost
            if hang := watch.observe(now, answered):
                self._lost = ClusterError(
                    f"{hang.message()}; every rank's stack is in {self._write(hang)}, --resume "
                    "continues from the last checkpoint"
                )
                return self._lost

    async def _look(self, seconds: float) -> dict[int, RankStatus | BaseException | None]:
        """Ask what every rank says of itself within ``seconds``, its death, or None."""
        asked = [
            asyncio.ensure_future(result_of(actor.status.remote(), ClusterError, named(rank)))
            for rank, actor in enumerate(self._actors)
        ]
        await asyncio.wait(asked, timeout=seconds)
        for each in asked:
            each.cancel()
        found = await asyncio.gather(*asked, return_exceptions=True)
        return {
            rank: None if isinstance(each, asyncio.CancelledError) else each
            for rank, each in enumerate(found)
        }

    async def _blame_the_dead(self, error: Exception) -> None:
        """Raise the death of a rank: it fails its neighbours' collectives before Ray tells of it.

        Raises:
            ClusterError: a rank is dead.
        """
        for each in (await self._look(LOOK_SECONDS)).values():
            if isinstance(each, ClusterError):
                self._lost = each
                raise each from error

    def _write(self, hang: Hang) -> Path:
        self._reports.mkdir(parents=True, exist_ok=True)
        path = self._reports / time.strftime("hang-%Y%m%d-%H%M%S.txt")
        path.write_text(hang.report(), encoding="utf-8")
        return path


def for_ranks(batch: TrainBatch) -> TrainBatch:
    """Return a batch without what no rank reads: texts, records' fields and draft sources."""

    def shipped(group: Group) -> Group:
        prompt = replace(group.prompt, text="", reference=None, metadata={})
        completions = (replace(s.completion, draft_sources=None) for s in group.samples)
        pairs = zip(group.samples, completions, strict=True)
        samples = tuple(replace(s, text="", completion=completion) for s, completion in pairs)
        return replace(group, prompt=prompt, samples=samples)

    return replace(batch, groups=tuple(map(shipped, batch.groups)))


@dataclass(frozen=True)
class LearnerPhase:
    """A phase of training, a `Learner`: its optimiser's settings and its number of steps."""

    ranks: LearnerRanks
    optimizer: OptimizerConfig
    num_steps: int

    async def forward_backward(self, batch: TrainBatch, algorithm: Algorithm) -> RanksUpdate:
        """Find what a batch's tokens are worth, and its first update's gradients over all ranks."""
        # Put once, read by every rank: Ray resolves the reference before it calls.
        shared: Any = ray.put(for_ranks(batch))
        report = await self.ranks.call(Rank.forward_backward, shared, algorithm)
        return RanksUpdate(self, batch.step, report)


@dataclass(frozen=True)
class RanksUpdate:
    """The gradients that all ranks hold of a batch; ``report`` is of the passes that found them."""

    phase: LearnerPhase
    step: int
    report: StepReport

    async def apply(self) -> StepReport:
        """Apply the batch's updates: version ``step`` becomes ``step + 1``."""
        phase = self.phase
        metrics = await phase.ranks.call(
            Rank.optimizer_step, phase.optimizer, self.step, phase.num_steps
        )
        return replace(
            self.report,
            version=WeightVersion(self.step + 1),
            metrics={**self.report.metrics, **metrics},
        )


def named(rank: int) -> str:
    """Name a rank in messages."""
    return f"learner rank {rank}"
