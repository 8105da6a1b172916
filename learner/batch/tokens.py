"""What is known of a batch's trained tokens before they are trained on (pure, numpy only).

Everything an advantage depends on lies here flat: n samples, one after the other, with N trained
tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from paceline.configs.errors import BatchError, NonFiniteError
from paceline.configs.vocabulary import Completion, Sample, TrainBatch


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
        """Name a sample for an error: by its group and its place among the siblings."""
        place = int((self.groups[:sample] == self.groups[sample]).sum())
        return f"sample {place} of group {self.group_ids[self.groups[sample]]}"

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Index of each sample's first token, int64 [n]."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]])

    def of_tokens(self, of_samples: NDArray) -> NDArray:
        """Repeat a sample's value [n] for each of its tokens [N]."""
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
    completions = [sample.completion for sample in samples]
    taught = [s.teacher_logprobs for s in samples if s.teacher_logprobs is not None]
    sizes = [len(group.samples) for group in batch.groups]
    return BatchTokens(
        group_ids=batch.group_ids,
        rewards=np.array([sample.reward for sample in samples], dtype=np.float64),
        groups=np.repeat(np.arange(len(sizes)), sizes),
        lengths=np.array([sample.num_tokens for sample in samples], dtype=np.int64),
        behaviour_logprobs=np.concatenate([completion.logprobs for completion in completions]),
        ages=np.concatenate([_ages(completion, batch.step) for completion in completions]),
        teacher_logprobs=np.concatenate(taught) if len(taught) == len(samples) else None,
    )


def _ages(completion: Completion, step: int) -> NDArray[np.int64]:
    """Count versions between the one that sampled each token and the one trained; 0 if none did."""
    ages = np.zeros(len(completion.token_ids), dtype=np.int64)
    for span in completion.versions:
        ages[span.start : span.end] = step - span.version
    return ages


def _check(batch: TrainBatch) -> None:
    where = f"step {batch.step}"
    if not batch.groups:
        raise BatchError(f"{where} has no samples: a batch needs at least one")
    for group in batch.groups:
        if not group.samples:
            raise BatchError(
                f"{where}: group {group.group_id} has no samples: look at what fills it"
            )
        if not group.prompt.token_ids:
            raise BatchError(
                f"{where}: group {group.group_id} has an empty prompt: nothing precedes the first "
                "tokens of its samples"
            )
        for place, sample in enumerate(group.samples):
            name = f"{where}: sample {place} of group {group.group_id}"
            _check_sample(name, sample, len(group.prompt.token_ids))


def _check_sample(name: str, sample: Sample, num_prompt: int) -> None:
    completion = sample.completion
    lengths = [len(completion.token_ids), len(completion.logprobs)]
    if sample.teacher_logprobs is not None:
        lengths.append(len(sample.teacher_logprobs))
    if completion.routed_experts is not None:
        lengths.append(len(completion.routed_experts) - num_prompt)
    if len(set(lengths)) > 1:
        raise BatchError(
            f"{name} has arrays of lengths {lengths} (tokens, log-probabilities, teacher's, "
            "experts without the prompt's): they must be equal"
        )
    if not sample.num_tokens:
        raise BatchError(f"{name} has no trained token: an empty completion cannot be learned from")
    if not np.isfinite(sample.reward):
        raise NonFiniteError(
            f"{name} has reward {sample.reward}: a finite number is needed; look at the grader"
        )
    bad = np.flatnonzero(~np.isfinite(completion.logprobs))
    if len(bad):
        raise NonFiniteError(
            f"{name} has log-probability {completion.logprobs[bad[0]]} at token {bad[0]} of its "
            "completion: a finite number is needed; look at how it was sampled"
        )
