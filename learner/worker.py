"""One rank of the learner: what the controller wraps in a Ray actor.

Every rank receives every call with the same arguments, takes its own share of the samples, and
returns the same result. Errors that depend on the data are raised on all ranks together, because a
rank that leaves a collective alone makes the others wait.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from paceline.configs.schema.algorithm_parts import CriticConfig
from paceline.configs.schema.learner import LearnerConfig, OptimizerConfig
from paceline.configs.schema.model import ModelConfig
from paceline.configs.vocabulary import (
    RankProgress,
    StepReport,
    TrainBatch,
    TrainSample,
    WeightVersion,
)
from paceline.learner.activity import collectives_begun
from paceline.learner.batch.inspection import prompt_and_completion
from paceline.learner.checkpoints.background_save import BackgroundSave
from paceline.learner.checkpoints.checkpoint import checkpoint_state, export_model, load_checkpoint
from paceline.learner.engines.mesh import require_determinism
from paceline.learner.model.heads import argmax_gaps
from paceline.learner.objective.objective import Algorithm
from paceline.learner.rank import RankModels
from paceline.learner.step import TrainingStep
from paceline.weights_sync.handle import WeightHandle
from paceline.weights_sync.shared_memory import SharedMemoryPublisher


class LearnerWorker:
    """Shards of the learner's models, their optimisers, and the calls that make the next version.

    ``rendezvous`` is ``tcp://host:port`` on rank 0's machine, the same on all ranks; one rank alone
    needs none, and in float32 it runs without process group and sharding. ``model_folder`` is the
    Hugging Face folder of version 0.

    Raises:
        ModelError: the model cannot be read or trained on packed rows.
        ClusterError: the other ranks, or the GPU asked for, are not there.
    """

    def __init__(
        self,
        model_folder: str,
        model: ModelConfig,
        config: LearnerConfig,
        critic: CriticConfig | None = None,
        *,
        rank: int,
        rendezvous: str | None,
        weights_folder: str,
        seed: int,
    ) -> None:
        torch.manual_seed(seed + rank)
        if config.deterministic:
            require_determinism()
        self.version = WeightVersion(0)
        self._precision = model.precision
        self._rank = rank
        self._critic = critic
        self._models = RankModels(
            model_folder, model, config, critic, rank=rank, rendezvous=rendezvous
        )
        self._step: TrainingStep | None = None
        self._saving = BackgroundSave(self._models.mesh)
        self._publisher = SharedMemoryPublisher(
            weights_folder, self._models.policy.layout(self._precision)
        )

    def forward_backward(self, batch: TrainBatch, algorithm: Algorithm) -> StepReport:
        """Find what a batch's tokens are worth and add the gradient of its first update.

        Nothing is applied. The report's ``version`` is that of the weights used; its metrics are
        ``loss`` and what the algorithm reports.

        Raises:
            BatchError: the batch lacks what the algorithm needs of it.
            NonFiniteError: a reward, advantage, log-probability or the loss is not finite;
                gradients are dropped.
        """
        started = time.perf_counter()
        with self._models.activity.during("passes over the batch"):
            step = TrainingStep(batch, algorithm, self._models, self._critic)
            try:
                step.add_gradients()
            except Exception:
                self._drop_gradients()
                raise
        self._step = step
        return StepReport(
            version=self.version,
            num_tokens=sum(len(sample.token_ids) for sample in batch.samples),
            num_trained_tokens=batch.num_trained_tokens,
            num_padding_tokens=sum(self._models.mesh.gather(step.num_padding_tokens)),
            seconds=time.perf_counter() - started,
            metrics=step.metrics(),
        )

    def optimizer_step(
        self, optimizer: OptimizerConfig, step: int, num_steps: int
    ) -> dict[str, float]:
        """Clip the gradients and write the weights, once for every update of the batch.

        A save in flight has copied them before. The weights are then version ``step + 1``;
        ``step`` of ``num_steps`` decides the learning rate.

        Returns:
            ``grad_norm`` before clipping (the largest of the updates), and ``learning_rate``; the
            critic's norm as ``critic_grad_norm``; after several updates the metrics of all.

        Raises:
            NonFiniteError: a gradient norm, or a later update's loss, is not finite; that update
                wrote no weight.
        """
        assert self._step is not None, "an optimiser step needs a forward_backward before it"
        work, self._step = self._step, None
        self._saving.fence()
        found = self._apply(optimizer, step, num_steps)
        metrics: dict[str, float] = {}
        while not work.is_done:
            with self._models.activity.during("passes over the batch"):
                work.add_gradients()
            applied = self._apply(optimizer, step, num_steps)
            found = {name: max(found[name], applied[name]) for name in applied}
            metrics = work.metrics()
        self.version = WeightVersion(step + 1)
        return metrics | found

    def reset_optimizer(self) -> None:
        """Forget the optimisers' moments and step counts: another objective begins."""
        self._saving.fence()
        for engine in self._models.trained().values():
            engine.reset_optimizer()

    def load_reference(self, folder: str, offload: bool = False) -> None:
        """Hold the policy of a Hugging Face folder as the frozen reference.

        With ``offload`` it lies in host memory between its passes.

        Raises:
            ModelError: it cannot be read.
        """
        self._models.load_reference(folder, offload)

    def publish(self, version: int) -> WeightHandle | None:
        """Write this rank's shards where engines read them; rank 0 returns the handle."""
        self._publisher.write(version, self._models.policy.shards())
        self._models.mesh.wait_for_all()
        return self._publisher.commit(version) if self._rank == 0 else None

    def save(self, folder: str) -> None:
        """Begin to write a sharded checkpoint of weights, optimiser state and version.

        The calls that follow do not wait for the disk; ``finish_save``, another save, ``load``,
        ``export`` and ``close`` do.

        Raises:
            CheckpointError: the save before this one failed.
        """
        self._saving.begin(folder, checkpoint_state(self._models.trained(), self.version))

    def finish_save(self) -> None:
        """Return once the checkpoint in flight is whole; may run beside any other call.

        Raises:
            CheckpointError: a rank could not write it.
        """
        self._saving.finish()

    def progress(self) -> RankProgress:
        """Where this rank stands; may be called from any thread while a call runs."""
        return RankProgress(self.version, self._models.activity.now, collectives_begun())

    def load(self, folder: str) -> None:
        """Restore a checkpoint of any number of ranks.

        Raises:
            CheckpointError: it is missing, incomplete or of another model, and nothing was loaded;
                or the save in flight failed.
        """
        self._saving.finish()
        self.version = WeightVersion(
            load_checkpoint(folder, self._models.trained(), self._models.mesh)
        )

    def export(self, folder: str) -> None:
        """Write the current weights as a Hugging Face folder in the model's precision.

        Raises:
            CheckpointError: the save in flight failed.
        """
        self._saving.finish()
        export_model(folder, self._models.policy, self._precision, self._models.mesh)

    def logprobs(
        self, samples: Sequence[TrainSample], temperature: float = 1.0
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities under the current weights: of each sample, float32 [L].

        0 where ``loss_mask`` is False, as in ``Trajectory.logprobs``.
        """
        found = self._models.logprobs(self._models.policy, samples, temperature)
        result = [np.zeros(len(sample.token_ids), dtype=np.float32) for sample in samples]
        for sample, values, filled in zip(samples, found, result, strict=True):
            filled[sample.loss_mask] = values
        return result

    def greedy_mismatches(self, sequences: Sequence[tuple[Any, ...]], tolerance: float) -> int:
        """How many completion tokens are not the most likely one after what precedes them.

        Args:
            sequences: ``(token_ids [L], prompt_length)`` of greedy completions, and where they were
                recorded the experts [L, layers, K] that the engine chose.
            tolerance: a token whose logit is this close to the highest counts as the highest.
        """
        samples = [prompt_and_completion(*sequence) for sequence in sequences]
        found = self._models.evaluate(self._models.policy, samples, argmax_gaps)
        return sum(int((gaps > tolerance).sum()) for gaps in found)

    def close(self) -> None:
        """Finish the save in flight and leave the process group.

        Raises:
            CheckpointError: the save failed.
        """
        try:
            self._saving.close()
        finally:
            if self._models.mesh.devices is not None and dist.is_initialized():
                dist.destroy_process_group()

    def _apply(self, optimizer: OptimizerConfig, step: int, num_steps: int) -> dict[str, float]:
        """One update of the policy and, where it has optimiser of its own, of the critic."""
        models = self._models
        with models.activity.during("optimiser"):
            found = models.policy.take_step(optimizer, step, num_steps)
            # a warm start trains no critic
            if models.critic is not None and models.critic.has_gradients():
                assert self._critic is not None
                settings = self._critic.optimizer or optimizer
                critic = models.critic.take_step(settings, step, num_steps)
                found["critic_grad_norm"] = critic["grad_norm"]
        return found

    def _drop_gradients(self) -> None:
        for engine in self._models.trained().values():
            engine.drop_gradients()
