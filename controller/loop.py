"""THE training loop: feed -> buffer -> generate[N] -> assemble -> queue(1) -> train -> sync.

Synchronous training is ``max_lag: 0``, supervised warm start is demonstrations in place of
``generate``; both run this very loop. Everything it calls is a part handed to it by
``controller/wiring/``.
"""

from __future__ import annotations

import asyncio
import itertools
from asyncio import Queue
from collections.abc import Iterator
from dataclasses import dataclass, field

from paceline.configs.vocabulary import Prompt, StepReport, UnfinishedGroup
from paceline.controller.groups.assembly import AssembledBatch, Collector, NoSignalError
from paceline.controller.groups.buffer import WorkBuffer, WorkerLost
from paceline.controller.groups.clock import StepClock
from paceline.controller.groups.freshness import FreshnessBudget
from paceline.controller.groups.pacing import Flow
from paceline.controller.ledger.events import Kind
from paceline.controller.ledger.journal import Journal
from paceline.controller.parts import (
    Algorithm,
    Generate,
    Learner,
    Pace,
    StepObserver,
    StepView,
    WeightsPart,
)
from paceline.weights_sync.handle import WeightHandle

Published = tuple[WeightHandle | None, tuple[int, ...]]
"""A version on its way to the engines, and the slots that are free once they serve it."""


@dataclass
class Loop:
    """Runs steps ``first_step`` to ``num_steps``; see each task for what it waits for.

    At most ``max_claims`` groups are with the workers at a time; ``buffer`` may hold recovered
    groups, and ``collector`` recorded batches.
    """

    prompts: Iterator[tuple[int, Prompt]]
    generate: Generate
    collector: Collector
    algorithm: Algorithm
    learner: Learner
    weights: WeightsPart
    observer: StepObserver
    budget: FreshnessBudget
    buffer: WorkBuffer
    journal: Journal
    pace: Pace
    num_steps: int
    first_step: int = 0
    max_claims: int = 256
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    exhausted: NoSignalError | None = field(default=None, init=False)
    steps_done: int = field(default=0, init=False)
    _clock: StepClock = field(default_factory=StepClock, init=False)
    _batches: Queue[AssembledBatch | None] = field(default_factory=lambda: Queue(1), init=False)
    _published: Queue[Published] = field(default_factory=lambda: Queue(1), init=False)
    _took_batch: float = field(default=0.0, init=False)

    async def run(self) -> None:
        """Run every task until ``train`` has done its steps, or one of them fails."""
        self._took_batch = asyncio.get_running_loop().time()
        num_generators = min(self.budget.capacity, self.max_claims)
        endless = {"feed": self._feed(), "assemble": self._assemble(), "sync": self._sync()}
        endless |= {f"generate-{i}": self._generate() for i in range(num_generators)}
        train = asyncio.create_task(self._train(), name="train")
        tasks = {train, *(asyncio.create_task(task, name=name) for name, task in endless.items())}
        try:
            running = tasks
            while not train.done():
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(self) -> None:
        """Admit prompts; waits for a free slot, which ``sync`` and ``assemble`` release."""
        while await self.buffer.admit(self.prompts.__next__):
            pass

    async def _generate(self) -> None:
        """Claim a group, sample and grade it; one whose segment ended before it goes back."""
        while work := await self.buffer.claim():
            try:
                group = await self.generate(work)
            except WorkerLost:
                self.buffer.give_back(work)
                continue
            if isinstance(group, UnfinishedGroup):
                self.buffer.give_back(work, group.partial, "unfinished")
            else:
                await self.buffer.finish(group)

    async def _assemble(self) -> None:
        """Turn finished groups into batches; waits for groups, then for room in the queue."""
        try:
            for step in itertools.count(self.first_step):
                await self._batches.put(await self.collector.collect(step))
        except NoSignalError as error:
            self.exhausted = error
            await self._batches.put(None)

    async def _train(self) -> None:
        """Train: the one finite task. Step v trains version v and makes version v + 1.

        Waits for a batch; then, gradients in hand, until version v has left the learner.
        """
        for step in range(self.first_step, self.num_steps):
            batch = await self._next_batch()
            if batch is None:
                break
            assert batch.max_age <= self.budget.max_age, f"step {step} got age {batch.max_age}"
            with self._clock.measure("train"):
                update = await self.learner.forward_backward(batch.batch, self.algorithm)
            with self._clock.measure("wait_for_sync"):
                await self._published.join()
            with self._clock.measure("optimizer"):
                report = await update.apply()
            with self._clock.measure("publish"):
                handle = await self.weights.publish(step + 1)
            self.journal.note(Kind.TRAINED, step, {"checksum": handle and handle.checksum})
            self._published.put_nowait((handle, batch.slots))
            self.steps_done += 1
            view = self._view(batch, report)
            if await self.observer.after_step(view):
                await self._published.join()
                if await self.observer.between_steps(view):
                    break
        await self._published.join()

    async def _sync(self) -> None:
        """Bring each version to the engines while the next step runs; then free its slots."""
        while True:
            handle, slots = await self._published.get()
            with self._clock.measure("sync"):
                await self.weights.push(handle)
            self.buffer.release(slots)
            self._published.task_done()

    async def _next_batch(self) -> AssembledBatch | None:
        """Return the next batch; None where none will come or a stop was asked for."""
        asked = asyncio.get_running_loop().time()
        with self._clock.measure("wait_for_batch"):
            waits = (
                asyncio.create_task(self._batches.get()),
                asyncio.create_task(self.stop.wait()),
            )
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        batch = None if self.stop.is_set() else waits[0].result()
        if batch is not None:
            self._adapt(batch, asked)
        return batch

    def _view(self, batch: AssembledBatch, report: StepReport) -> StepView:
        return StepView(
            batch,
            report,
            seconds=self._clock.read_and_reset(),
            occupancy=self.buffer.occupancy(),
            num_bytes=self.buffer.num_bytes,
            is_last=batch.step + 1 == self.num_steps,
        )

    def _adapt(self, batch: AssembledBatch, asked: float) -> None:
        """Let more or less work in, by how long the learner waited and what lay ready."""
        now = asyncio.get_running_loop().time()
        self.buffer.begin_training(batch.slots)
        occupancy = self.buffer.occupancy()
        in_production = occupancy["waiting"] + occupancy["claimed"]
        surplus = occupancy["slots"] - in_production - occupancy["training"]
        self.buffer.limit = self.pace.observe(Flow(now - asked, now - self._took_batch, surplus))
        self._took_batch = now
