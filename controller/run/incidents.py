"""A step that cannot be taken: kept so that it can be taken again, by itself, and looked at.

``incidents/step-000012/`` in the run's folder holds the batch with its algorithm (``batch.pkl``),
the learner's weights and optimiser as they were (``learner/``) and what was wrong
(``incident.json``). ``paceline reproduce FOLDER`` does that step again in this process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ray import cloudpickle

from paceline.configs.errors import BatchError, CheckpointError
from paceline.configs.load import load_config
from paceline.configs.schema.algorithm import critic_of, reference_of
from paceline.configs.vocabulary import StepReport, TrainBatch
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import read_json, write_json
from paceline.controller.parts import Algorithm
from paceline.controller.ranks.learner_ranks import LearnerRanks
from paceline.controller.wiring.processes import LEARNER_WORKER

T = TypeVar("T")


@dataclass
class CautiousLearner:
    """The learner, which keeps what a failed step needs to be reproduced before it fails the run.

    ``folder`` is the run's ``incidents``.
    """

    learner: LearnerRanks
    folder: Path

    async def forward_backward(self, batch: TrainBatch, algorithm: Algorithm) -> StepReport:
        """Gradients of a batch.

        Raises:
            BatchError: it cannot be trained on; says where it was kept.
        """
        self._work = (batch, algorithm)
        return await self._kept(self.learner.forward_backward(batch, algorithm))

    async def optimizer_step(self, step: int, report: StepReport) -> StepReport:
        """Apply them.

        Raises:
            BatchError: a gradient is not finite; says where the batch was kept.
        """
        return await self._kept(self.learner.optimizer_step(step, report))

    async def _kept(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except BatchError as error:
            batch, algorithm = self._work
            folder = self.folder / f"step-{batch.step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "batch.pkl").write_bytes(cloudpickle.dumps((batch, algorithm)))
            finish_save = await self.learner.save(str(folder / "learner"))
            await finish_save()
            write_json(folder / "incident.json", {"step": batch.step, "error": str(error)})
            raise type(error)(
                f"{error} (kept in {folder}: `paceline reproduce {folder}` does this step again)"
            ) from error


def reproduce(folder: Path) -> StepReport:
    """Do the step of an incident again, on one rank in this process; nothing is written.

    Raises:
        BatchError: it fails again.
        CheckpointError: the folder holds no incident of a run.
    """
    incident = read_json(folder / "incident.json")
    if not isinstance(incident, dict):
        raise CheckpointError(
            f"{folder} holds no incident.json, expected a folder like RUN/incidents/step-000012"
        )
    run = RunFolder.open(folder.parent.parent)
    config = load_config(run.config)
    batch, algorithm = cloudpickle.loads((folder / "batch.pkl").read_bytes())
    with tempfile.TemporaryDirectory() as weights_folder:
        worker = LEARNER_WORKER(
            config.model.path or str(run.initial),
            config.model,
            config.learner.model_copy(update={"num_ranks": 1, "gpus_per_rank": 0}),
            critic_of(config.algorithm),
            rank=0,
            rendezvous=None,
            weights_folder=weights_folder,
            seed=config.seed,
        )
        worker.load(str(folder / "learner"))
        reference = reference_of(config.algorithm)
        if reference is not None:
            worker.load_reference(reference.path or str(run.reference))
        report = worker.forward_backward(batch, algorithm)
        optimizer, num_steps = config.learner.optimizer, config.loop.num_steps
        worker.optimizer_step(batch.step + 1, optimizer, batch.step, num_steps)
        return report
