"""The parts the loop is made of, as protocols: what it may ask of each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from paceline.configs.vocabulary import Group, StepReport, TrainBatch, UnfinishedGroup
from paceline.controller.groups.assembly import AssembledBatch
from paceline.controller.groups.buffer import Work
from paceline.controller.groups.pacing import Flow
from paceline.weights_sync.handle import WeightHandle

Algorithm = Any
"""What the learner optimises (``learner/objective/objective.py``); the controller carries it."""

Finish = Callable[[], Awaitable[None]]
"""Waits until what was begun to be written is whole."""


class Generate(Protocol):
    """Fills a claimed group: sampling and grading, or looking up a demonstration."""

    async def __call__(self, work: Work) -> Group | UnfinishedGroup:
        """Return the finished group, or what there is of it where another segment continues it.

        Raises:
            WorkerLost: nothing came of it; another attempt can succeed.
        """


class Update(Protocol):
    """A batch whose gradients the learner holds, and which it has not applied."""

    async def apply(self) -> StepReport:
        """Apply them, and the batch's other updates: the batch's step makes the next version.

        The report is of the whole step.
        """


class Learner(Protocol):
    """The learner ranks as one, in a phase of training with an optimiser of its own."""

    async def forward_backward(self, batch: TrainBatch, algorithm: Algorithm) -> Update:
        """Find what a batch's tokens are worth, and the gradients of its first update."""


class WeightsPart(Protocol):
    """Brings versions from the learner to the engines."""

    async def publish(self, version: int) -> WeightHandle | None:
        """Put a version where engines can read it; the learner may move on when this returns."""

    async def push(self, handle: WeightHandle | None) -> None:
        """Return once every engine serves the published version."""


class Pace(Protocol):
    """Says how many slots may be held."""

    def observe(self, flow: Flow) -> int:
        """Return the limit from now on, after what a step saw."""


@dataclass(frozen=True)
class StepView:
    """A step that was applied and published.

    ``seconds`` are those since the step before, by what they were spent on; ``occupancy`` and
    ``num_bytes`` are the buffer's. ``is_last`` where the loop was asked for no more steps.
    """

    batch: AssembledBatch
    report: StepReport
    seconds: Mapping[str, float]
    occupancy: Mapping[str, int]
    num_bytes: int
    is_last: bool

    @property
    def finished(self) -> int:
        """Steps that are done, this one included; also the version it made."""
        return self.batch.step + 1


class StepObserver(Protocol):
    """Sees every step, and says what has to happen before the next: evaluation, checkpoints."""

    async def after_step(self, step: StepView) -> bool:
        """Record a step; return whether something is due before the next."""

    async def between_steps(self, step: StepView) -> bool:
        """Do what is due after a step, while the engines serve its version and the slots of its
        batch are free; return whether to end the loop."""
