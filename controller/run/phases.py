"""What happens around the loop's steps: records, validation, checkpoints, self-checks, stopping."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from paceline.controller.engines.pool import WorkerPool
from paceline.controller.ledger.journal import Journal
from paceline.controller.observe.files.recorder import Recorder
from paceline.controller.parts import StepView
from paceline.controller.run.metering import RunTotals, StepMeter, sample_records

MetricsHook = Callable[[StepView], Mapping[str, float]]
"""Sees a step and returns metrics of its own."""


@dataclass(frozen=True)
class StepHook:
    """Something to do between two steps of training; ``run`` is given the number of those done.

    Due after the first ``first`` steps and after each ``every``-th; never after the last step.
    """

    run: Callable[[int], Awaitable[None]]
    every: int | None = None
    first: int = 0

    def is_due(self, step: StepView) -> bool:
        """Return whether it is to be run after a step."""
        return step.finished <= self.first or (
            is_multiple(step.finished, self.every) and not step.is_last
        )


@dataclass
class TrainingObserver:
    """Observes reinforcement learning: every step is recorded; hooks run, in order, when due.

    ``metrics`` see a step before the next prompts are admitted: its slots are not free yet.
    """

    recorder: Recorder
    meter: StepMeter
    totals: RunTotals
    pool: WorkerPool
    journal: Journal
    samples_per_step: int
    metrics: Sequence[MetricsHook] = ()
    hooks: Sequence[StepHook] = ()

    async def after_step(self, step: StepView) -> bool:
        """Record the step; return whether a hook is due."""
        # Before the first await: the slots of this step are not free yet, so that the next prompts
        # are chosen knowing how it went, and a checkpoint holds what its steps told.
        metrics = dict(step.report.metrics)
        for hook in self.metrics:
            metrics |= hook(step)
        report = replace(step.report, metrics=metrics)
        self.totals.add(step.batch, report)
        if step.batch.batch.step in self.journal.state.diverged:
            self.recorder.message(
                f"step {step.finished}, done again, made other weights than before it was "
                "interrupted: settings or machine differ; groups that were sampled since are of "
                "the old ones"
            )
        engines = await self.pool.counters()
        self.recorder.step(self.meter.measure(replace(step, report=report), engines))
        self.recorder.samples(sample_records(step.batch, self.samples_per_step))
        self.recorder.workers(self.pool.states())
        return any(hook.is_due(step) for hook in self.hooks)

    async def between_steps(self, step: StepView) -> bool:
        """Run the hooks that are due; the loop never ends by them."""
        for hook in self.hooks:
            if hook.is_due(step):
                await hook.run(step.finished)
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

    async def after_step(self, step: StepView) -> bool:
        """Record the step; return whether a validation is due."""
        self.next_position = max(step.batch.batch.group_ids) + 1
        self.recorder.step(self.meter.measure(step, []))
        return step.is_last or is_multiple(step.finished, self.evaluate_every)

    async def between_steps(self, step: StepView) -> bool:
        """Validate; return whether the target is reached."""
        self.reached = await self.validate(step.finished)
        return self.reached >= self.target_accuracy


def is_multiple(finished: int, every: int | None) -> bool:
    """Return whether something that happens every so many steps happens after this one."""
    return every is not None and finished % every == 0
