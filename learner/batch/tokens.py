"""What is known of a batch's trained tokens before they are trained on (pure, numpy only).

Everything an advantage depends on lies here flat: n samples, one after the other, with N trained
tokens in all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from paceline.configs.errors import BatchError, NonFiniteError
from paceline.configs.vocabulary import TrainBatch, TrainSample


@dataclass(frozen=True)
class BatchTokens:
    """Samples and their trained tokens.

    Of samples: ``rewards`` float64 [n], ``groups`` int64 [n] (index of its group in ``group_ids``),
    ``lengths`` int64 [n] (trained tokens, at least 1). Of tokens, all [N]: ``behaviour_logprobs``
    float32 and ``ages`` int64 in weight versions; where they were asked for, float32:
    ``proximal_logprobs`` (under the weights at the start of the step), ``reference_logprobs``,
    ``teacher_logprobs`` and the critic's ``values`` of the state before the token.
    """

    group_ids: tuple[int, ...]
    rewards: NDArray[np.float64]
    groups: NDArray[np.int64]
    lengths: NDArray[np.int64]
    behaviour_logprobs: NDArray[np.float32]
    ages: NDArray[np.int64]
    teacher_logprobs: NDArray[np.float32] | None = None
    proximal_logprobs: NDArray[np.float32] | None = None
    reference_logprobs: NDArray[np.float32] | None = None
    values: NDArray[np.float32] | None = None

    def name_of(self, sample: int) -> str:
        """How an error names a sample: by its group and its place among the siblings."""
        place = int((self.groups[:sample] == self.groups[sample]).sum())
        return f"sample {place} of group {self.group_ids[self.groups[sample]]}"

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each sample's tokens begin, int64 [n]."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]])

    def of_tokens(self, of_samples: NDArray) -> NDArray:
        """A sample's value [n] for each of its tokens [N]."""
        return np.repeat(of_samples, self.lengths)

    def sums(self, of_tokens: NDArray) -> NDArray[np.float64]:
        """Sum over each sample's tokens: float64 [n] from [N]."""
        return np.add.reduceat(of_tokens.astype(np.float64), self.starts)


def batch_tokens(batch: TrainBatch) -> BatchTokens:
    """Gather a batch's tokens, and refuse what cannot be trained on.

    Raises:
        BatchError: there is no sample, a group is empty, a sample trains nothing, or its arrays
            disagree in length.
        NonFiniteError: a reward or behaviour log-probability is not finite.
    """
    _check(batch)
    samples = batch.samples
    lengths = np.array([sample.loss_mask.sum() for sample in samples], dtype=np.int64)
    teacher = None
    if all(sample.teacher_logprobs is not None for sample in samples):
        teacher = _trained(samples, (sample.teacher_logprobs for sample in samples))
    return BatchTokens(
        group_ids=batch.group_ids,
        rewards=np.array([sample.reward for sample in samples], dtype=np.float64),
        groups=np.array([sample.group for sample in samples], dtype=np.int64),
        lengths=lengths,
        behaviour_logprobs=_trained(samples, (sample.logprobs for sample in samples)),
        ages=np.concatenate([_ages(sample, batch.step) for sample in samples]),
        teacher_logprobs=teacher,
    )


def _ages(sample: TrainSample, step: int) -> NDArray[np.int64]:
    """Versions between the one that sampled each trained token and the one trained; else 0."""
    ages = np.zeros(len(sample.loss_mask), dtype=np.int64)
    first = int(np.argmax(sample.loss_mask))
    for span in sample.versions:
        ages[first + span.start : first + span.end] = step - span.version
    return ages[sample.loss_mask]


def _trained(
    samples: Iterable[TrainSample], arrays: Iterable[NDArray | None]
) -> NDArray[np.float32]:
    pairs = zip(samples, arrays, strict=True)
    return np.concatenate([a[s.loss_mask] for s, a in pairs if a is not None])


def _check(batch: TrainBatch) -> None:
    where = f"step {batch.step}"
    if not batch.samples:
        raise BatchError(f"{where} has no samples: a batch needs at least one")
    places: Counter[int] = Counter()
    for sample in batch.samples:
        name = f"{where}: sample {places[sample.group]} of group {batch.group_ids[sample.group]}"
        places[sample.group] += 1
        _check_sample(name, sample)
    for index, group_id in enumerate(batch.group_ids):
        if not places[index]:
            raise BatchError(f"{where}: group {group_id} has no samples: look at what fills it")


def _check_sample(name: str, sample: TrainSample) -> None:
    lengths = [len(sample.token_ids), len(sample.loss_mask), len(sample.logprobs)]
    if sample.teacher_logprobs is not None:
        lengths.append(len(sample.teacher_logprobs))
    if sample.routed_experts is not None:
        lengths.append(len(sample.routed_experts))
    if len(set(lengths)) > 1:
        raise BatchError(
            f"{name} has arrays of lengths {lengths} (tokens, mask, log-probabilities, teacher's, "
            "experts): they must be equal"
        )
    if not sample.loss_mask.any():
        raise BatchError(f"{name} has no trained token: an empty completion cannot be learned from")
    if sample.loss_mask[0]:
        raise BatchError(f"{name} trains its first token, which nothing precedes: give a prompt")
    if not np.isfinite(sample.reward):
        raise NonFiniteError(
            f"{name} has reward {sample.reward}: a finite number is needed; look at the grader"
        )
    bad = np.flatnonzero(sample.loss_mask & ~np.isfinite(sample.logprobs))
    if len(bad):
        raise NonFiniteError(
            f"{name} has log-probability {sample.logprobs[bad[0]]} at token {bad[0]}: a finite "
            "number is needed; look at how it was sampled"
        )
