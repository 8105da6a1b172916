"""What happens around the loop's steps: records, validation, checkpoints, self-checks, stopping."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from paceline.configs.vocabulary import StepReport
from paceline.controller.data.curriculum import Outcome
from paceline.controller.engines.pool import WorkerPool
from paceline.controller.groups.assembly import AssembledBatch
from paceline.controller.loop import Loop
from paceline.controller.observe.files.recorder import Recorder
from paceline.controller.run.metering import RunTotals, StepMeter, sample_records

StepHook = Callable[[int], Awaitable[None]]
"""Called with the number of finished steps, while the engines serve exactly that version."""

OutcomeHook = Callable[[Iterable[Outcome]], Mapping[str, float]]
"""Told how a step's groups went; answers with metrics of its own."""


DriftHook = Callable[[AssembledBatch, StepReport], Mapping[str, float]]
"""Sees how far a step took the policy; answers with metrics of its own."""


@dataclass
class TrainingObserver:
    """Observes reinforcement learning: every step is recorded; hooks run when they are due."""

    recorder: Recorder
    meter: StepMeter
    totals: RunTotals
    pool: WorkerPool
    samples_per_step: int
    observe_outcomes: OutcomeHook
    observe_drift: DriftHook | None
    evaluate: StepHook
    evaluate_every: int | None
    checkpoint: StepHook
    checkpoint_every: int | None
    self_check: StepHook
    self_check_steps: int

    async def after_step(self, batch: AssembledBatch, report: StepReport, loop: Loop) -> bool:
        """Record the step, then run what is due; never ends the loop by itself."""
        finished = batch.batch.step + 1
        # Before the first await: the slots of this step are not free yet, so that the next prompts
        # are chosen knowing how it went, and a checkpoint holds what its steps told.
        found = dict(self.observe_outcomes(batch.outcomes))
        if self.observe_drift is not None:
            found |= self.observe_drift(batch, report)
        report = replace(report, metrics={**report.metrics, **found})
        self.totals.add(batch, report)
        if batch.batch.step in loop.buffer.journal.state.diverged:
            self.recorder.message(
                f"step {finished}, done again, made other weights than before it was interrupted: "
                "settings or machine differ; groups that were sampled since are of the old ones"
            )
        counters = await self.pool.counters()
        self.recorder.step(self.meter.measure(batch, report, loop, counters))
        self.recorder.samples(sample_records(batch, self.samples_per_step))
        last = finished == loop.num_steps
        hooks = [
            (self.self_check, finished <= self.self_check_steps),
            (self.evaluate, is_due(finished, self.evaluate_every) and not last),
            (self.checkpoint, is_due(finished, self.checkpoint_every) and not last),
        ]
        if any(due for _, due in hooks):
            await loop.settled()
            for hook, due in hooks:
                if due:
                    await hook(finished)
            self.meter.restart(await self.pool.counters())
        self.recorder.workers(self.pool.states())
        return False


@dataclass
class WarmStartObserver:
    """Observes the supervised warm start and ends it once the model is good enough.

    ``next_position`` is the feed's after the last prompt trained on. The feed itself has run ahead,
    how far depends on timing: what follows must not.
    """

    recorder: Recorder
    meter: StepMeter
    validate: Callable[[int], Awaitable[float]]
    evaluate_every: int
    target_accuracy: float
    reached: float = 0.0
    next_position: int = 0

    async def after_step(self, batch: AssembledBatch, report: StepReport, loop: Loop) -> bool:
        """Record the step; True once a validation reaches the target."""
        finished = batch.batch.step + 1
        self.next_position = max(batch.batch.group_ids) + 1
        self.recorder.step(self.meter.measure(batch, report, loop, []))
        if is_due(finished, self.evaluate_every) or finished == loop.num_steps:
            self.reached = await self.validate(finished)
        return self.reached >= self.target_accuracy


def is_due(finished: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and finished % every == 0
