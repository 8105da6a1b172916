"""A learner rank as the controller sees it: the calls its process takes."""

from __future__ import annotations

from typing import Any, Protocol

from paceline.configs.schema.learner import OptimizerConfig
from paceline.configs.vocabulary import RankProgress, StepReport, TrainBatch
from paceline.controller.parts import Algorithm
from paceline.weights_sync.handle import WeightHandle


class Rank(Protocol):
    """One rank of the learner; `LearnerWorker` is what is behind it.

    Every rank is given every call with the same arguments, and all of them return the same result,
    but for ``publish``, whose handle is rank 0's.
    """

    def reset_optimizer(self) -> None:
        """Forget moments and step counts of the optimisers: another objective begins."""

    def forward_backward(self, batch: TrainBatch, algorithm: Algorithm) -> StepReport:
        """Find what a batch's tokens are worth, and the gradient of its first update."""

    def optimizer_step(
        self, optimizer: OptimizerConfig, step: int, num_steps: int
    ) -> dict[str, float]:
        """Apply it and the batch's other updates: version ``step + 1``; return their metrics."""

    def publish(self, version: int) -> WeightHandle | None:
        """Write this rank's shards of a version where engines can read them."""

    def load_reference(self, folder: str, offload: bool = False) -> None:
        """Hold the policy of a folder as the frozen reference."""

    def save(self, folder: str) -> None:
        """Begin to write model and optimiser, sharded."""

    def finish_save(self) -> None:
        """Return once what `save` began is whole; may run beside any other call."""

    def load(self, folder: str) -> None:
        """Read what `save` wrote, by any number of ranks."""

    def export(self, folder: str) -> None:
        """Write the model in Hugging Face format."""

    def greedy_mismatches(self, sequences: list[tuple[Any, ...]], tolerance: float) -> int:
        """Count completion tokens that are not the argmax of the rank's own forward pass."""

    def progress(self) -> RankProgress:
        """Return where the rank stands; may be called from any thread while a call runs."""

    def close(self) -> None:
        """Leave the process group."""
