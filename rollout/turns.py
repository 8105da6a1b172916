"""A turn: what a request asks of the engine for each sample, and how what came is joined to it.

Pure bookkeeping, without an engine. A sample may be sampled over many turns, on many workers and by
many weight versions; whoever continues it needs its tokens and nothing else.
"""

from __future__ import annotations

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
    """What an unfinished sample asks of the engine: at most ``max_tokens`` after ``token_ids``.

    ``seed`` is that of this turn's random stream, ``sample_seed`` the sample's own, the same in
    every turn. The last ``num_scored`` tokens of ``token_ids`` are to be scored; then what is
    sampled is of no account.
    """

    index: int
    token_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    sample_seed: int
    num_scored: int = 0


class Turn:
    """One request while an engine works on it: what each sample has, and which are still open."""

    def __init__(self, request: RolloutRequest) -> None:
        earlier = request.partial or (NOTHING_YET,) * request.num_samples
        assert len(earlier) == request.num_samples, "a partial holds every sample of the request"
        self.request = request
        self._completions = [ended_by_budget(c, request.sampling.max_tokens) for c in earlier]
        self._open = {i for i, c in enumerate(self._completions) if not c.is_finished}

    @property
    def open_samples(self) -> list[int]:
        """Samples the engine still owes an answer, in order."""
        return sorted(self._open)

    @property
    def is_over(self) -> bool:
        """Whether nothing is owed any more."""
        return not self._open

    def task(self, index: int) -> SampleTask:
        """What sample ``index`` asks for in this turn."""
        earlier = self._completions[index].token_ids.tolist()
        left = self.request.sampling.max_tokens - len(earlier)
        return SampleTask(
            index=index,
            token_ids=(*self.request.prompt_token_ids, *earlier),
            max_tokens=min(left, self.request.segment_tokens or left),
            seed=continuation_seed(self.request.seed + index, len(earlier)),
            sample_seed=self.request.seed + index,
        )

    def close_sample(self, index: int, new: Completion) -> None:
        """Take what the engine sampled for ``index`` in this turn.

        Its ``finish_reason`` is the engine's: ``length`` is the budget of the turn.
        """
        whole = joined(self._completions[index], new)
        if new.finish_reason == "length":
            whole = ended_by_budget(
                replace(whole, finish_reason="segment"), self.request.sampling.max_tokens
            )
        self._completions[index] = whole
        self._open.remove(index)

    def completion(self, index: int) -> Completion:
        """What sample ``index`` has so far."""
        return self._completions[index]

    def result(self) -> RolloutResult:
        """Every sample with all it has."""
        assert self.is_over, f"samples {self.open_samples} are still open"
        return RolloutResult(self.request.request_id, tuple(self._completions))


class ScoringTurn:
    """One request whose completions an engine scores: they come back with its log-probabilities."""

    def __init__(self, request: RolloutRequest) -> None:
        assert len(request.partial) == request.num_samples, "what is scored comes with the request"
        assert all(len(each.token_ids) for each in request.partial), "nothing has no score"
        self.request = request
        self._completions = list(request.partial)
        self._open = set(range(request.num_samples))

    @property
    def open_samples(self) -> list[int]:
        """Samples the engine still owes an answer, in order."""
        return sorted(self._open)

    @property
    def is_over(self) -> bool:
        """Whether nothing is owed any more."""
        return not self._open

    def task(self, index: int) -> SampleTask:
        """The whole of sample ``index``; an engine must sample something, so it is one token."""
        scored = self._completions[index].token_ids.tolist()
        return SampleTask(
            index=index,
            token_ids=(*self.request.prompt_token_ids, *scored),
            max_tokens=1,
            seed=self.request.seed + index,
            sample_seed=self.request.seed + index,
            num_scored=len(scored),
        )

    def close_sample(self, index: int, new: Completion) -> None:
        """Take the scores of a sample, or ``abort`` where there are none."""
        finish_reason = self._completions[index].finish_reason
        if new.finish_reason == "abort":
            finish_reason = "abort"
        self._completions[index] = replace(
            self._completions[index], logprobs=new.logprobs, finish_reason=finish_reason
        )
        self._open.remove(index)

    def result(self) -> RolloutResult:
        """Every sample with its scores."""
        assert self.is_over, f"samples {self.open_samples} are still open"
        return RolloutResult(self.request.request_id, tuple(self._completions))


def ended_by_budget(completion: Completion, max_tokens: int) -> Completion:
    """The completion, finished by ``length`` where it is unfinished and has no budget left."""
    if completion.is_finished or len(completion.token_ids) < max_tokens:
        return completion
    return replace(completion, finish_reason="length")


def continuation_seed(seed: int, num_earlier: int) -> int:
    """Seed of a sample's stream after ``num_earlier`` tokens: a stream of its own, never reused.

    With the sample's first seed, the numbers that drew its first tokens would draw again.
    """
    if num_earlier == 0:
        return seed
    return int(np.random.SeedSequence([seed, num_earlier]).generate_state(1)[0])


def joined(earlier: Completion, new: Completion) -> Completion:
    """``earlier`` continued by ``new``, whose spans count from its own first token."""
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
    """Draft sources of both; what was sampled by an engine that does not draft has none."""
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
    """Experts of the prompt and all tokens, which ``new`` knows too, but from its own passes over
    them; None where an engine did not record them."""
    if earlier is None or new is None:
        return None
    num_read = len(earlier) - 1
    return np.concatenate([earlier[:num_read], new[num_read:]])


def joined_spans(
    earlier: tuple[VersionSpan, ...], new: tuple[VersionSpan, ...], num_earlier: int
) -> tuple[VersionSpan, ...]:
    """Spans of both in the whole's coordinates; neighbours of one version become one span."""
    spans = list(earlier)
    for span in new:
        start, end = span.start + num_earlier, span.end + num_earlier
        if spans and spans[-1].version == span.version:
            start = spans.pop().start
        spans.append(VersionSpan(span.version, start, end))
    return tuple(spans)
