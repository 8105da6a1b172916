"""A step that cannot be taken: kept so that it can be taken again, by itself, and looked at.

``incidents/step-000012/`` in the run's folder holds the batch with its algorithm (``batch.pkl``),
the learner's weights and optimiser as they were (``learner/``) and what was wrong
(``incident.json``). ``paceline reproduce FOLDER`` does that step again in this process.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from ray import cloudpickle

from paceline.configs.errors import BatchError, CheckpointError
from paceline.configs.load import load_config
from paceline.configs.schema.algorithm import critic_of, reference_of
from paceline.configs.vocabulary import StepReport, TrainBatch
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import read_json, write_json
from paceline.controller.parts import Algorithm, Learner, Update
from paceline.controller.run.checkpoints import Save
from paceline.controller.wiring.processes import LEARNER_WORKER


@dataclass(frozen=True)
class CautiousLearner:
    """A learner that keeps what a failed step needs to be reproduced before the run fails.

    ``save`` writes weights and optimiser; ``folder`` is the run's ``incidents``.
    """

    learner: Learner
    save: Save
    folder: Path

    async def forward_backward(self, batch: TrainBatch, algorithm: Algorithm) -> CautiousUpdate:
        """Find the gradients of a batch.

        Raises:
            BatchError: it cannot be trained on; says where it was kept.
        """
        incident = Incident(self.save, self.folder, batch, algorithm)
        async with incident.kept():
            return CautiousUpdate(await self.learner.forward_backward(batch, algorithm), incident)


@dataclass(frozen=True)
class CautiousUpdate:
    """An update, and the incident it is if it cannot be applied."""

    update: Update
    incident: Incident

    async def apply(self) -> StepReport:
        """Apply the gradients.

        Raises:
            BatchError: one is not finite; says where the batch was kept.
        """
        async with self.incident.kept():
            return await self.update.apply()


@dataclass(frozen=True)
class Incident:
    """A batch whose step may fail, and where it is kept then."""

    save: Save
    folder: Path
    batch: TrainBatch
    algorithm: Algorithm

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Keep what the step needs if the block fails over the batch, and say where.

        Raises:
            BatchError: it failed.
        """
        try:
            yield
        except BatchError as error:
            folder = self.folder / f"step-{self.batch.step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            content = cloudpickle.dumps((self.batch, self.algorithm))
            (folder / "batch.pkl").write_bytes(content)
            finish_save = await self.save(str(folder / "learner"))
            if finish_save is not None:
                await finish_save()
            write_json(folder / "incident.json", {"step": self.batch.step, "error": str(error)})
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
        worker.optimizer_step(optimizer, batch.step, num_steps)
        return report
