"""Segments: what a request asks of the engine for each sample, and how the answer is joined to it.

Pure bookkeeping, without an engine. A sample may be sampled in many segments, on many workers and
by many weight versions; to continue it, a worker needs its tokens and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from paceline.configs.vocabulary import Completion, RolloutRequest, VersionSpan
from paceline.rollout.engine import RolloutResult

NOTHING_YET = Completion(
    token_ids=np.empty(0, dtype=np.int32),
    logprobs=np.empty(0, dtype=np.float32),
    versions=(),
    finish_reason="abort",
)


@dataclass(frozen=True)
class SampleTask:
    """Work on one sample: at most ``max_tokens`` tokens after ``token_ids``.

    ``seed`` is that of this segment's random stream, ``sample_seed`` the sample's own, the same in
    every segment. The last ``num_scored`` tokens of ``token_ids`` are to be scored; then what is
    sampled is thrown away.
    """

    index: int
    token_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    sample_seed: int
    num_scored: int = 0


class ActiveRequest(ABC):
    """One request while an engine works on it: what each sample has, and which are still open."""

    def __init__(self, request: RolloutRequest, completions: tuple[Completion, ...]) -> None:
        assert len(completions) == request.num_samples, "a partial holds every sample"
        self.request = request
        self._completions = list(completions)
        self._open = {i for i, each in enumerate(completions) if not self._is_answered(each)}

    @property
    def open_samples(self) -> list[int]:
        """Samples the engine still owes an answer, in order."""
        return sorted(self._open)

    @property
    def is_finished(self) -> bool:
        """True once every sample is answered."""
        return not self._open

    @abstractmethod
    def task(self, index: int) -> SampleTask:
        """Return the work that sample ``index`` asks for."""

    def close_sample(self, index: int, new: Completion) -> None:
        """Take the engine's answer for sample ``index``."""
        self._completions[index] = self._answered(self._completions[index], new)
        self._open.remove(index)

    def result(self) -> RolloutResult:
        """Return every sample with all it has."""
        assert self.is_finished, f"samples {self.open_samples} are still open"
        return RolloutResult(self.request.request_id, tuple(self._completions))

    @abstractmethod
    def _is_answered(self, completion: Completion) -> bool:
        """Return whether a sample that came with the request is to be returned as it is."""

    @abstractmethod
    def _answered(self, earlier: Completion, new: Completion) -> Completion:
        """Return a sample that came as ``earlier`` with the engine's answer ``new``."""


class SegmentRequest(ActiveRequest):
    """A request whose unfinished samples an engine continues, each by one segment."""

    def __init__(self, request: RolloutRequest) -> None:
        earlier = request.partial or (NOTHING_YET,) * request.num_samples
        max_tokens = request.sampling.max_tokens
        super().__init__(request, tuple(ended_by_budget(each, max_tokens) for each in earlier))

    def task(self, index: int) -> SampleTask:
        """Return the segment of sample ``index``: what follows the tokens it has."""
        earlier = self._completions[index].token_ids.tolist()
        left = self.request.sampling.max_tokens - len(earlier)
        return SampleTask(
            index=index,
            token_ids=(*self.request.prompt_token_ids, *earlier),
            max_tokens=min(left, self.request.segment_tokens or left),
            seed=continuation_seed(self.request.seed + index, len(earlier)),
            sample_seed=self.request.seed + index,
        )

    def _is_answered(self, completion: Completion) -> bool:
        return completion.is_finished

    def _answered(self, earlier: Completion, new: Completion) -> Completion:
        """Join both; the ``length`` of ``new`` is the end of its segment."""
        whole = joined(earlier, new)
        if new.finish_reason != "length":
            return whole
        whole = replace(whole, finish_reason="segment")
        return ended_by_budget(whole, self.request.sampling.max_tokens)


class ScoringRequest(ActiveRequest):
    """A request whose completions come back with the engine's log-probabilities of them."""

    def __init__(self, request: RolloutRequest) -> None:
        assert all(len(each.token_ids) for each in request.partial), "nothing has no score"
        super().__init__(request, request.partial)

    def task(self, index: int) -> SampleTask:
        """Return the whole of sample ``index``, and one token to sample: an engine must."""
        scored = self._completions[index].token_ids.tolist()
        return SampleTask(
            index=index,
            token_ids=(*self.request.prompt_token_ids, *scored),
            max_tokens=1,
            seed=self.request.seed + index,
            sample_seed=self.request.seed + index,
            num_scored=len(scored),
        )

    def _is_answered(self, completion: Completion) -> bool:
        return False

    def _answered(self, earlier: Completion, new: Completion) -> Completion:
        """Put the scores in; an ``abort`` has none."""
        finish_reason = "abort" if new.finish_reason == "abort" else earlier.finish_reason
        return replace(earlier, logprobs=new.logprobs, finish_reason=finish_reason)


def ended_by_budget(completion: Completion, max_tokens: int) -> Completion:
    """Return a completion, finished by ``length`` if it is unfinished and has no budget left."""
    if completion.is_finished or len(completion.token_ids) < max_tokens:
        return completion
    return replace(completion, finish_reason="length")


def continuation_seed(seed: int, num_earlier: int) -> int:
    """Return the seed of a sample's stream after ``num_earlier`` tokens: a stream never reused.

    With the sample's first seed, the numbers that drew its first tokens would draw again.
    """
    if num_earlier == 0:
        return seed
    return int(np.random.SeedSequence([seed, num_earlier]).generate_state(1)[0])


def joined(earlier: Completion, new: Completion) -> Completion:
    """Join ``new`` to ``earlier``; the spans of ``new`` count from its own first token."""
    if not len(earlier.token_ids):
        return new
    return Completion(
        token_ids=np.concatenate([earlier.token_ids, new.token_ids]),
        logprobs=np.concatenate([earlier.logprobs, new.logprobs]),
        versions=joined_spans(earlier.versions, new.versions, len(earlier.token_ids)),
        finish_reason=new.finish_reason,
        draft_sources=joined_sources(earlier, new),
        routed_experts=joined_experts(earlier.routed_experts, new.routed_experts),
    )


def joined_sources(earlier: Completion, new: Completion) -> NDArray[np.uint8] | None:
    """Join the draft sources of both; an engine that does not draft gives none."""
    if earlier.draft_sources is None and new.draft_sources is None:
        return None
    return np.concatenate(
        [
            np.zeros(len(part.token_ids), np.uint8)
            if part.draft_sources is None
            else part.draft_sources
            for part in (earlier, new)
        ]
    )


def joined_experts(
    earlier: NDArray[np.int16] | None, new: NDArray[np.int16] | None
) -> NDArray[np.int16] | None:
    """Join the experts of the prompt and all tokens, int16 [num_tokens, layers, K].

    ``new`` has them for earlier tokens too, but from its own passes over them. None if an engine
    did not record them.
    """
    if earlier is None or new is None:
        return None
    num_read = len(earlier) - 1
    return np.concatenate([earlier[:num_read], new[num_read:]])


def joined_spans(
    earlier: tuple[VersionSpan, ...], new: tuple[VersionSpan, ...], num_earlier: int
) -> tuple[VersionSpan, ...]:
    """Join spans in the whole's coordinates; neighbours of one version become one span."""
    spans = list(earlier)
    for span in new:
        start, end = span.start + num_earlier, span.end + num_earlier
        if spans and spans[-1].version == span.version:
            start = spans.pop().start
        spans.append(VersionSpan(span.version, start, end))
    return tuple(spans)
