"""THE training loop: feed -> buffer -> generate[N] -> assemble -> queue(1) -> train -> sync.

Synchronous training is ``max_lag: 0``, supervised warm start is demonstrations in place of
``generate``; both run this very loop. Everything it calls is a part handed to it by
``controller/wiring/``.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from paceline.configs.vocabulary import Prompt, UnfinishedGroup
from paceline.controller.groups.assembly import AssembledBatch, Collector, NoSignalError
from paceline.controller.groups.buffer import WorkBuffer
from paceline.controller.groups.clock import StepClock
from paceline.controller.groups.freshness import FreshnessBudget
from paceline.controller.groups.pacing import Flow
from paceline.controller.ledger.events import Kind
from paceline.controller.parts import (
    Algorithm,
    Generate,
    Learner,
    Pace,
    StepObserver,
    WeightsPart,
    WorkerLost,
)
from paceline.weights_sync.handle import WeightHandle


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
    pace: Pace
    num_steps: int
    first_step: int = 0
    max_claims: int = 256
    clock: StepClock = field(default_factory=StepClock)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    exhausted: NoSignalError | None = None
    steps_done: int = 0

    async def run(self) -> None:
        """Run every task until ``train`` has done its steps, or one of them fails."""
        self._batches: asyncio.Queue[AssembledBatch | None] = asyncio.Queue(maxsize=1)
        self._published: asyncio.Queue[tuple[WeightHandle | None, AssembledBatch]]
        self._published = asyncio.Queue(maxsize=1)
        self._in_training = 0
        self._took_batch = asyncio.get_running_loop().time()
        num_generators = min(self.budget.capacity, self.max_claims)
        generators = {f"generate-{i}": self._generate() for i in range(num_generators)}
        coroutines = {"feed": self._feed(), "assemble": self._assemble(), "sync": self._sync()}
        coroutines |= generators | {"train": self._train()}
        tasks = {asyncio.create_task(task, name=name) for name, task in coroutines.items()}
        train = next(task for task in tasks if task.get_name() == "train")
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
        """Claim a group, sample and grade it; one whose turn ended before it goes back."""
        while work := await self.buffer.claim():
            try:
                group = await self.generate(work)
            except WorkerLost:
                await self.buffer.give_back(work)
                continue
            if isinstance(group, UnfinishedGroup):
                await self.buffer.give_back(work, group.partial, "unfinished")
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
        """The one finite task: step v trains version v and makes version v + 1.

        Waits for a batch; then, gradients in hand, until version v has left the learner.
        """
        for step in range(self.first_step, self.num_steps):
            batch = await self._next_batch()
            if batch is None:
                break
            assert batch.max_age <= self.budget.max_age, f"step {step} got age {batch.max_age}"
            with self.clock.measure("train"):
                report = await self.learner.forward_backward(batch.batch, self.algorithm)
            with self.clock.measure("wait_for_sync"):
                await self._published.join()
            with self.clock.measure("optimizer"):
                report = await self.learner.optimizer_step(step, report)
            with self.clock.measure("publish"):
                handle = await self.weights.publish(step + 1)
            self.buffer.journal.note(Kind.TRAINED, step, {"checksum": handle and handle.checksum})
            self._published.put_nowait((handle, batch))
            self.steps_done += 1
            if await self.observer.after_step(batch, report, self):
                break
        await self._published.join()

    async def _sync(self) -> None:
        """Bring each version to the engines while the next step runs; then free its slots."""
        while True:
            handle, batch = await self._published.get()
            with self.clock.measure("sync"):
                await self.weights.push(handle)
            await self.buffer.release(batch.slots)
            self._in_training -= len(batch.slots)
            self._published.task_done()

    async def settled(self) -> None:
        """Wait until the engines serve the last version and its slots are free."""
        await self._published.join()

    async def _next_batch(self) -> AssembledBatch | None:
        """The next batch; None where none will come or a stop was asked for."""
        asked = asyncio.get_running_loop().time()
        with self.clock.measure("wait_for_batch"):
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

    def _adapt(self, batch: AssembledBatch, asked: float) -> None:
        """Let more or less work in, by how long the learner waited and what lay ready."""
        now = asyncio.get_running_loop().time()
        self._in_training += len(batch.slots)
        occupancy = self.buffer.occupancy()
        in_production = occupancy["waiting"] + occupancy["claimed"]
        surplus = occupancy["slots"] - in_production - self._in_training
        self.buffer.limit = self.pace.observe(Flow(now - asked, now - self._took_batch, surplus))
        self._took_batch = now
