"""One rank of the learner: what the controller wraps in a Ray actor.

Every rank receives every call with the same arguments, takes its own share of the samples, and
returns the same result. Errors that depend on the data are raised on all ranks together, because a
rank that leaves a collective alone makes the others wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from paceline.configs.errors import ClusterError
from paceline.configs.schema.learner import LearnerConfig, OptimizerConfig
from paceline.configs.schema.model import ModelConfig
from paceline.configs.vocabulary import StepReport, TrainBatch, TrainSample, WeightVersion
from paceline.kernels.token_logprobs import token_logprobs
from paceline.learner.bundles import bundle_samples
from paceline.learner.checkpoint import export_model, load_checkpoint, save_checkpoint
from paceline.learner.inspection import argmax_gaps, prompt_and_completion
from paceline.learner.losses import Loss, LossInputs, NonFiniteError
from paceline.learner.mesh import (
    gather_objects,
    join_process_group,
    local_shards,
    shard_policy,
)
from paceline.learner.metrics import StepMetrics
from paceline.learner.microbatch import Microbatch, build_microbatch, check_finite
from paceline.learner.model import Head, load_policy
from paceline.learner.optimizer import build_optimizer, reset_state, take_step
from paceline.learner.packing import plan_packing
from paceline.weights_sync.handle import WeightHandle
from paceline.weights_sync.layout import Layout, TensorSpec
from paceline.weights_sync.shared_memory import SharedMemoryPublisher

HeadOf = Callable[[Microbatch], Head]


class LearnerWorker:
    """A model replica's shard, its optimiser, and the calls that make the next weight version.

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
        *,
        rank: int,
        rendezvous: str | None,
        weights_folder: str,
        seed: int,
    ) -> None:
        torch.manual_seed(seed + rank)
        self.version = WeightVersion(0)
        self._config = config
        self._precision = model.precision
        self._rank = rank
        self._device = _device(config)
        # One rank in bfloat16 is sharded over itself: FSDP's mixed precision is then the same
        # arithmetic on any number of ranks.
        self._is_sharded = config.num_ranks > 1 or model.precision != "float32"
        if self._is_sharded:
            join_process_group(config, rank, rendezvous, self._device)
        self._policy = load_policy(
            model_folder, activation_checkpointing=config.activation_checkpointing
        )
        self._quadratic_cost = self._policy.quadratic_cost()
        if self._is_sharded:
            shard_policy(self._policy, self._device, config.num_ranks, model.precision)
        self._policy.to(self._device)
        self._optimizer = build_optimizer(list(self._policy.parameters()))
        self._publisher = SharedMemoryPublisher(weights_folder, self._layout())

    def forward_backward(self, batch: TrainBatch, loss: Loss) -> StepReport:
        """Add the gradient of the batch's token-mean loss to the gradients; apply nothing.

        The report's ``version`` is that of the weights used; its metrics are ``loss`` and what the
        loss reports.

        Raises:
            NonFiniteError: an advantage, log-probability or the loss is not finite; gradients are
                dropped.
        """
        started = time.perf_counter()
        check_finite(batch.samples, batch.step)
        num_trained = batch.num_trained_tokens
        assert num_trained > 0, "a batch without trained tokens"
        # FSDP averages gradients over ranks; the denominator already counts all ranks' tokens
        scale = self._config.num_ranks / num_trained
        metrics = StepMetrics()
        num_padding = 0
        for microbatch in self._microbatches(batch.samples):
            head = partial(
                token_logprobs, targets=microbatch.targets, temperature=batch.temperature
            )
            logprobs, entropy = self._policy(microbatch.row, head)
            if not microbatch.samples:
                num_padding += microbatch.row.token_ids.numel()
                logprobs.sum().backward()
                continue
            outputs = loss(
                LossInputs(logprobs, microbatch.behaviour_logprobs, microbatch.advantages, entropy)
            )
            (outputs.loss_sum * scale).backward()
            metrics.add(outputs)
        means = metrics.reduced(num_trained)
        self._check_loss(means["loss"], batch.step)
        return StepReport(
            version=self.version,
            num_tokens=sum(len(sample.token_ids) for sample in batch.samples),
            num_trained_tokens=num_trained,
            num_padding_tokens=sum(gather_objects(num_padding)),
            seconds=time.perf_counter() - started,
            metrics=means,
        )

    def optimizer_step(
        self, version: int, optimizer: OptimizerConfig, step: int, num_steps: int
    ) -> dict[str, float]:
        """Clip the accumulated gradients and write the weights, which are then ``version``.

        ``step`` of ``num_steps`` decides the learning rate.

        Returns:
            ``grad_norm`` before clipping, and ``learning_rate``.

        Raises:
            NonFiniteError: the gradient norm is not finite; no weight was written.
        """
        report = take_step(self._optimizer, optimizer, step, num_steps)
        self.version = WeightVersion(version)
        return report

    def reset_optimizer(self) -> None:
        """Forget the optimiser's moments and step count: another objective begins."""
        reset_state(self._optimizer)

    def publish(self, version: int) -> WeightHandle | None:
        """Write this rank's shards where engines read them; rank 0 returns the handle."""
        self._publisher.write(version, local_shards(self._policy))
        if self._is_sharded:
            dist.barrier()
        return self._publisher.commit(version) if self._rank == 0 else None

    def save(self, folder: str) -> None:
        """Write a sharded checkpoint of weights, optimiser state and version."""
        save_checkpoint(folder, self._policy, self._optimizer, self.version)

    def load(self, folder: str) -> None:
        """Restore a checkpoint of any number of ranks.

        Raises:
            CheckpointError: it is missing, incomplete or of another model.
        """
        self.version = WeightVersion(load_checkpoint(folder, self._policy, self._optimizer))

    def export(self, folder: str) -> None:
        """Write the current weights as a Hugging Face folder in the model's precision."""
        export_model(folder, self._policy, self._precision)

    def logprobs(
        self, samples: Sequence[TrainSample], temperature: float = 1.0
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities under the current weights: of each sample, float32 [L].

        0 where ``loss_mask`` is False, as in ``Trajectory.logprobs``.
        """

        def head(microbatch: Microbatch) -> Head:
            return partial(token_logprobs, targets=microbatch.targets, temperature=temperature)

        found: dict[int, NDArray[np.float32]] = {}
        for indices, values in self._evaluate(samples, head):
            of_samples = np.split(values, np.cumsum([samples[i].loss_mask.sum() for i in indices]))
            found.update(zip(indices, of_samples, strict=False))
        for others in gather_objects(found):
            found |= others
        result = [np.zeros(len(sample.token_ids), dtype=np.float32) for sample in samples]
        for index, values in found.items():
            result[index][samples[index].loss_mask] = values
        return result

    def greedy_mismatches(
        self, sequences: Sequence[tuple[NDArray[np.int32], int]], tolerance: float
    ) -> int:
        """How many completion tokens are not the most likely one after what precedes them.

        Args:
            sequences: ``(token_ids [L], prompt_length)`` of greedy completions.
            tolerance: a token whose logit is this close to the highest counts as the highest.
        """

        def head(microbatch: Microbatch) -> Head:
            return partial(argmax_gaps, targets=microbatch.targets)

        samples = [prompt_and_completion(tokens, length) for tokens, length in sequences]
        mine = sum(int((gaps > tolerance).sum()) for _, gaps in self._evaluate(samples, head))
        return sum(gather_objects(mine))

    def close(self) -> None:
        """Leave the process group."""
        if self._is_sharded and dist.is_initialized():
            dist.destroy_process_group()

    def _microbatches(self, samples: Sequence[TrainSample]) -> Iterator[Microbatch]:
        """This rank's share of the samples that train anything."""
        capacity, num_ranks = self._config.tokens_per_microbatch, self._config.num_ranks
        bundles = bundle_samples(samples, capacity, num_ranks)
        sizes = [bundle.size for bundle in bundles]
        costs = [bundle.cost(self._quadratic_cost) for bundle in bundles]
        for chosen in plan_packing(sizes, costs, num_ranks, capacity)[self._rank]:
            yield build_microbatch([bundles[i] for i in chosen], samples, self._device)

    @torch.no_grad()
    def _evaluate(
        self, samples: Sequence[TrainSample], head_of: HeadOf
    ) -> Iterator[tuple[tuple[int, ...], NDArray[np.float32]]]:
        """This rank's share: indices, and the head's first output for their trained tokens."""
        for microbatch in self._microbatches(samples):
            values: Tensor = self._policy(microbatch.row, head_of(microbatch))[0]
            yield microbatch.samples, values.cpu().numpy()

    def _check_loss(self, loss: float, step: int) -> None:
        if not np.isfinite(loss):
            self._optimizer.zero_grad()
            raise NonFiniteError(
                f"the loss of step {step} is {loss}: no weight was changed; lower the learning "
                "rate or look at the batch's samples"
            )

    def _layout(self) -> Layout:
        return Layout(
            tuple(
                TensorSpec(name, tuple(parameter.shape), self._precision)
                for name, parameter in self._policy.causal_lm.named_parameters()
            )
        )


def _device(config: LearnerConfig) -> torch.device:
    if not config.gpus_per_rank:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError(
            f"learner.gpus_per_rank is {config.gpus_per_rank:g} but torch sees no GPU here: "
            "install with CUDA, or set it to 0"
        )
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)
