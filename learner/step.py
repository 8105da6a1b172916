"""One training step on one rank: passes over the whole batch, then the gradients of its updates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Set
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.configs.errors import BatchError, NonFiniteError
from paceline.configs.schema.algorithm_parts import CriticConfig
from paceline.configs.vocabulary import TrainBatch
from paceline.learner.batch.microbatch import Microbatch
from paceline.learner.batch.sequences import token_sequences
from paceline.learner.batch.tokens import BatchTokens, batch_tokens
from paceline.learner.engines.metrics import StepMetrics
from paceline.learner.engines.training_engine import LossOf
from paceline.learner.model.experts import router_metrics
from paceline.learner.model.heads import logprobs_and_entropy
from paceline.learner.model.model import no_head
from paceline.learner.objective.advantages import Pass
from paceline.learner.objective.losses.inputs import LossInputs, Sequences
from paceline.learner.objective.losses.value import value_loss
from paceline.learner.objective.objective import Algorithm, check_advantages, derived_metrics
from paceline.learner.rank import RankModels

Columns = dict[str, NDArray[np.float32]]
Arrays = list[NDArray[np.float32]]
CRITIC_COLUMNS = frozenset({"returns", "old_values"})
WHERE_FROM: dict[Pass, str] = {
    "teacher": "a `teacher`",
    "reference": "`algorithm.reference`",
    "values": "`algorithm.critic`",
}


class TrainingStep:
    """A batch in training.

    Raises:
        BatchError: the batch lacks what the algorithm needs of it.
        NonFiniteError: a reward, advantage or log-probability is not finite.
    """

    def __init__(
        self,
        batch: TrainBatch,
        algorithm: Algorithm,
        models: RankModels,
        critic: CriticConfig | None,
    ) -> None:
        self._batch = batch
        self._algorithm = algorithm
        self._models = models
        self._critic = critic
        tokens = batch_tokens(batch)
        self._sequences = token_sequences(batch.groups)
        self._tokens = self._with_passes(tokens, algorithm.passes)
        prepared = algorithm.prepare(self._tokens)
        check_advantages(self._tokens, prepared.columns["advantages"])
        self._columns: Columns = dict(prepared.columns)
        if prepared.returns is not None:
            assert self._tokens.values is not None, "returns are the critic's to predict"
            self._columns |= {"returns": prepared.returns, "old_values": self._tokens.values}
        self._updates = prepared.updates
        self._batch_metrics = dict(prepared.metrics)
        self._next_update = 0
        self._means: list[tuple[int, dict[str, float]]] = []
        self._expert_counts: list[NDArray[np.int64]] = []
        self._imbalances: list[float] = []
        self.num_padding_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch, each sample's prompt included."""
        return sum(len(sequence.token_ids) for sequence in self._sequences)

    @property
    def is_done(self) -> bool:
        """True once every update had its gradients."""
        return self._next_update == len(self._updates)

    def add_gradients(self) -> None:
        """Add the gradients of the next update to the parameters'.

        Raises:
            NonFiniteError: its loss is not finite.
        """
        chosen = self._updates[self._next_update]
        sequences = [self._sequences[index] for index in chosen]
        metrics = StepMetrics()
        models = self._models
        share = models.share(sequences)
        microbatches = share.microbatches
        self._imbalances.append(share.imbalance)
        self.num_padding_tokens += sum(m.num_padding_tokens for m in microbatches)
        head = partial(logprobs_and_entropy, temperature=self._batch.temperature)
        loss_of = self._reporting("policy", len(microbatches), partial(self._loss, chosen, metrics))
        models.policy.add_gradients(microbatches, head, loss_of)
        if "returns" in self._columns and models.critic is not None:
            value_loss_of = self._reporting(
                "critic", len(microbatches), partial(self._value_loss, chosen, metrics)
            )
            models.critic.add_gradients(microbatches, no_head, value_loss_of)
        counts = models.policy.take_expert_counts()
        if counts is not None:
            self._expert_counts += models.mesh.gather(counts)
        num_trained = int(self._tokens.lengths[chosen].sum())
        means = metrics.reduced(num_trained, models.mesh)
        if not np.isfinite(means["loss"]):
            raise NonFiniteError(
                f"the loss of step {self._batch.step} is {means['loss']}: no weight was changed; "
                "lower the learning rate or look at the batch's samples"
            )
        self._means.append((num_trained, means))
        self._next_update += 1

    def metrics(self) -> dict[str, float]:
        """Return metrics of the updates so far: means over their tokens, and maxima."""
        counts = np.array([count for count, _ in self._means], dtype=np.float64)
        shares = counts / counts.sum()
        means = {
            name: (
                max(found[name] for _, found in self._means)
                if name.endswith("_max")
                else float(sum(s * m[name] for s, (_, m) in zip(shares, self._means, strict=True)))
            )
            for name in self._means[0][1]
        }
        routers = router_metrics(np.sum(self._expert_counts, axis=0)) if self._expert_counts else {}
        waiting = {"rank_imbalance": float(np.mean(self._imbalances))}
        return derived_metrics(means) | self._batch_metrics | routers | waiting

    def _reporting(self, model: str, num_microbatches: int, loss_of: LossOf) -> LossOf:
        """Return the same loss, which also reports this rank's progress as its activity."""
        update = f"update {self._next_update + 1} of {len(self._updates)}, {model}"
        counter = itertools.count(1)

        def reporting(microbatch: Microbatch, outputs: tuple[Tensor, ...]) -> Tensor:
            number = next(counter)
            self._models.activity.tell(f"{update}, microbatch {number} of {num_microbatches}")
            return loss_of(microbatch, outputs)

        self._models.activity.tell(f"{update}, before its losses")
        return reporting

    def _loss(
        self,
        chosen: NDArray[np.int64],
        metrics: StepMetrics,
        microbatch: Microbatch,
        outputs: tuple[Tensor, ...],
    ) -> Tensor:
        """Return the loss of the policy's outputs, a shared backbone's values among them."""
        logprobs, entropy, *values = outputs
        if not microbatch.samples:
            return sum((v.sum() for v in values), logprobs.sum())
        columns = self._columns_of(
            chosen[list(microbatch.samples)], self._columns.keys() - CRITIC_COLUMNS
        )
        sequences = Sequences.of_lengths(microbatch.lengths)
        found = self._algorithm.loss(LossInputs(logprobs, entropy, sequences, **columns))
        metrics.add({"loss": found.loss, **found.metrics}, found.maxima)
        if "returns" not in self._columns or not values:
            return found.loss
        return found.loss + self._value_loss(chosen, metrics, microbatch, tuple(values))

    def _value_loss(
        self,
        chosen: NDArray[np.int64],
        metrics: StepMetrics,
        microbatch: Microbatch,
        outputs: tuple[Tensor, ...],
    ) -> Tensor:
        """Return the loss of the values."""
        (values,) = outputs
        if not microbatch.samples:
            return values.sum()
        assert self._critic is not None
        columns = self._columns_of(chosen[list(microbatch.samples)], CRITIC_COLUMNS | {"weights"})
        errors_T = value_loss(values, columns["old_values"], columns["returns"], self._critic.clip)
        metrics.add({"value_loss": errors_T.detach().sum()})
        return self._critic.coefficient * (columns["weights"] * errors_T).sum()

    def _columns_of(self, samples: NDArray[np.int64], names: Set[str]) -> dict[str, Tensor]:
        """Return columns of some samples' tokens, in their order, float32 [T]."""
        starts, lengths = self._tokens.starts[samples], self._tokens.lengths[samples]
        rows = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
        device = self._models.mesh.device
        return {name: torch.from_numpy(self._columns[name][rows]).to(device) for name in names}

    def _with_passes(self, tokens: BatchTokens, passes: frozenset[Pass]) -> BatchTokens:
        """Compute what the algorithm wants to know of every token."""
        models, sequences = self._models, self._sequences
        temperature = self._batch.temperature
        missing = {
            "teacher": tokens.teacher_logprobs is None,
            "reference": models.reference is None,
            "values": models.value_model is None,
        }
        for name, where in WHERE_FROM.items():
            if name in passes and missing[name]:
                raise BatchError(
                    f"step {self._batch.step}: the algorithm needs {name} of every token, and "
                    f"there is none: configure {where}, or choose an algorithm that needs none"
                )

        def computed(name: Pass, find: Callable[[], Arrays]) -> NDArray[np.float32] | None:
            return np.concatenate(find()) if name in passes else None

        return replace(
            tokens,
            proximal_logprobs=computed(
                "proximal", lambda: models.logprobs(models.policy, sequences, temperature)
            ),
            reference_logprobs=computed(
                "reference", lambda: models.reference_logprobs(sequences, temperature)
            ),
            values=computed("values", lambda: models.values(sequences)),
        )
