"""Records that all packages share: what flows from a prompt to a training step.

``Prompt -> RolloutRequest -> Completion -> Sample -> Group -> TrainBatch -> StepReport`` flows
forward; only ``WeightVersion`` (and freed slots) flow back. A prompt is there once a group, and
arrays are of completions only. Arrays are numpy: tensors exist only inside
``learner/`` and ``kernels/``.

A weight version is the number of optimiser steps that made it: version 0 is the initial model,
and training step ``v`` consumes version ``v`` and produces version ``v + 1``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NewType

import numpy as np
from numpy.typing import NDArray

WeightVersion = NewType("WeightVersion", int)
FinishReason = Literal["stop", "length", "segment", "abort"]
"""Why sampling ended. ``stop`` and ``length`` (the whole ``max_tokens``) finish a sample; after
``segment`` (the turn's budget is used up) and ``abort`` (weights changed, or the claim was taken
back) it can be continued by any worker."""


@dataclass(frozen=True)
class Record:
    """One problem as its source holds it, before it becomes a prompt.

    ``fields`` fill the prompt and answer templates and reach the grader as ``Prompt.metadata``;
    ``reference`` is the gold answer where there is one.
    """

    id: str
    fields: Mapping[str, Any]
    reference: str | None = None


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenised once.

    ``reference`` is the gold answer where the source has one (exact graders compare with it);
    ``metadata`` is the record's fields (graders and demonstrations use them), and must pickle.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingParameters:
    """Settings of sampling; ``temperature=0`` is greedy, ``top_k=0`` keeps every token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class RolloutRequest:
    """Ask an engine for ``num_samples`` completions of one prompt, or to go on with them.

    Sample ``i`` draws from its own random stream, seeded with ``seed + i``: what is sampled does
    not depend on which other requests share the engine's batch.

    ``partial`` is what earlier turns left of every sample, in order (empty: nothing yet): finished
    ones are returned as they are, the others continued after their last token. ``segment_tokens``
    is the most tokens this turn may add to a sample; 0 means no such limit.

    With ``scores`` nothing is sampled: ``partial`` comes back with the log-probabilities that the
    engine's model gives its tokens, at temperature 1.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParameters
    num_samples: int
    seed: int
    partial: tuple[Completion, ...] = ()
    segment_tokens: int = 0
    scores: bool = False


@dataclass(frozen=True)
class VersionSpan:
    """Completion tokens ``[start, end)`` were sampled by weight version ``version``."""

    version: WeightVersion
    start: int
    end: int


DRAFTED_FROM_SIBLINGS = 1
"""A token's draft came from a sample of the same prompt by the weights served then."""
DRAFTED_FROM_HISTORY = 2
"""It came from a sample by older weights, or from a file of draft texts."""


NOT_ROUTED = -1
"""In place of an expert: which one it was is not known."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation as the engine returns it.

    ``token_ids`` int32 [C] includes the stop token where there was one; ``logprobs`` float32 [C]
    are natural-log probabilities under the *sampling* distribution (after temperature, top-k and
    top-p); ``versions`` tile ``[0, C)`` without gaps. ``draft_sources`` uint8 [C] is there where
    the engine drafts: 0 for a token that was not drafted, or ``DRAFTED_FROM_…``. Where it records
    routing, ``routed_experts`` int16 [P + C, layers, K] are the experts that every token of prompt
    and completion was sent to, ``NOT_ROUTED`` where that is not known: of the last token, which no
    pass of the engine has read, at least.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    draft_sources: NDArray[np.uint8] | None = None
    routed_experts: NDArray[np.int16] | None = None

    @property
    def is_finished(self) -> bool:
        """True when nothing is left to be sampled."""
        return self.finish_reason in ("stop", "length")

    @property
    def num_bytes(self) -> int:
        """Size of its arrays."""
        arrays = (self.token_ids, self.logprobs, self.draft_sources, self.routed_experts)
        return sum(array.nbytes for array in arrays if array is not None)


@dataclass(frozen=True)
class DraftText:
    """A completion of a prompt that drafts are guessed from, and the weights that sampled it.

    ``token_ids`` int32 [C], a few tokens of what came before them included; ``version`` is -1 if no
    weights of this run sampled it.
    """

    prompt_token_ids: tuple[int, ...]
    version: int
    token_ids: NDArray[np.int32]


@dataclass(frozen=True)
class Sample:
    """A completion and what came of it: the unit of a loss.

    ``text`` is the completion decoded; ``teacher_logprobs`` float32 [C], where a teacher scored it,
    are natural-log probabilities of its tokens at temperature 1.
    """

    completion: Completion
    reward: float = 0.0
    text: str = ""
    teacher_logprobs: NDArray[np.float32] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the completion, all of them trained on."""
        return len(self.completion.token_ids)

    @property
    def num_bytes(self) -> int:
        """Size of its arrays."""
        taught = 0 if self.teacher_logprobs is None else self.teacher_logprobs.nbytes
        return self.completion.num_bytes + taught

    @property
    def oldest_version(self) -> WeightVersion | None:
        """The oldest weights that sampled any token of it; None for a demonstration."""
        return min((span.version for span in self.completion.versions), default=None)


@dataclass(frozen=True)
class Group:
    """All samples of one prompt: the unit that is admitted, claimed, scored and trained.

    ``fault`` says in a word why it must not be trained on, whatever its rewards.
    """

    group_id: int
    prompt: Prompt
    samples: tuple[Sample, ...]
    fault: str | None = None

    @property
    def rewards(self) -> NDArray[np.float64]:
        """Rewards of the samples, float64 [n]."""
        return np.array([sample.reward for sample in self.samples], dtype=np.float64)

    @property
    def oldest_version(self) -> WeightVersion | None:
        """The oldest weights that sampled any token of the group; None for demonstrations."""
        return min(self._versions(), default=None)

    @property
    def newest_version(self) -> WeightVersion | None:
        """The newest weights that sampled any token of the group; None for demonstrations."""
        return max(self._versions(), default=None)

    @property
    def num_bytes(self) -> int:
        """Size of its arrays."""
        return sum(sample.num_bytes for sample in self.samples)

    def _versions(self) -> Iterator[WeightVersion]:
        return (span.version for s in self.samples for span in s.completion.versions)


@dataclass(frozen=True)
class UnfinishedGroup:
    """A group that goes back to be continued: what was sampled so far, in sample order."""

    group_id: int
    partial: tuple[Completion, ...]


@dataclass(frozen=True)
class TrainBatch:
    """Groups that one optimiser step trains on.

    ``temperature`` is the sampling temperature: the learner divides its logits by it, so that its
    log-probabilities are of the distribution that was sampled.
    """

    step: int
    groups: tuple[Group, ...]
    temperature: float = 1.0

    @property
    def group_ids(self) -> tuple[int, ...]:
        """Ids of its groups, in their order."""
        return tuple(group.group_id for group in self.groups)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Samples of all groups, group by group: an index into them names a sample in a step."""
        return tuple(sample for group in self.groups for sample in group.samples)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that carry loss, over all ranks."""
        return sum(sample.num_tokens for sample in self.samples)


@dataclass(frozen=True)
class StepReport:
    """Results of one optimiser step; ``metrics`` are means over trained tokens."""

    version: WeightVersion
    num_tokens: int
    num_trained_tokens: int
    num_padding_tokens: int
    seconds: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RankProgress:
    """Position of a learner rank inside a call: the step, the pass, and the number of collectives
    it has begun by process group."""

    version: int = 0
    doing: str = ""
    collectives: Mapping[str, int] = field(default_factory=dict)
