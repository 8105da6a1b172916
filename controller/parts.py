"""The parts the loop is made of, as protocols: what it may ask of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from paceline.configs.vocabulary import Group, StepReport, TrainBatch, UnfinishedGroup
from paceline.controller.groups.buffer import Work
from paceline.controller.groups.pacing import Flow
from paceline.weights_sync.handle import WeightHandle

if TYPE_CHECKING:
    from paceline.controller.groups.assembly import AssembledBatch
    from paceline.controller.loop import Loop

Algorithm = Any
"""What the learner optimises (``learner/objective/objective.py``); the controller carries it."""


class WorkerLost(Exception):
    """The worker that held a claim is gone; the claim can be given to another."""


class Generate(Protocol):
    """Fills a claimed group: sampling and grading, or looking up a demonstration."""

    async def __call__(self, work: Work) -> Group | UnfinishedGroup:
        """The finished group, or what there is of it where it is to be continued by another turn.

        Raises:
            WorkerLost: nothing came of it; another attempt can succeed.
        """


class Learner(Protocol):
    """The learner ranks as one."""

    async def forward_backward(self, batch: TrainBatch, algorithm: Algorithm) -> StepReport:
        """Find what a batch's tokens are worth, and the gradients of its first update."""

    async def optimizer_step(self, step: int, report: StepReport) -> StepReport:
        """Apply them, and the batch's other updates: version ``step`` becomes ``step + 1``.

        The report gains what that showed.
        """


class WeightsPart(Protocol):
    """Brings versions from the learner to whoever samples."""

    async def publish(self, version: int) -> WeightHandle | None:
        """Put a version where engines can read it; the learner may move on when this returns."""

    async def push(self, handle: WeightHandle | None) -> None:
        """Return once every engine serves the published version."""


class Pace(Protocol):
    """Says how many slots may be held."""

    def observe(self, flow: Flow) -> int:
        """The limit from now on, after what a step saw."""


class StepObserver(Protocol):
    """Sees every step: metrics, evaluation, checkpoints, and the wish to stop."""

    async def after_step(self, batch: AssembledBatch, report: StepReport, loop: Loop) -> bool:
        """Called when a step was applied and published; True ends the loop."""
