"""The drafters that are compared, behind one face: Paceline's history and Arctic's suffix cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from paceline.controller.bench.harness.result import BenchError
from paceline.controller.bench.suffix.streams import Tokens
from paceline.spec.draft_text import OVERLAP_TOKENS
from paceline.spec.history import History

MAX_DRAFT = 8
MIN_PROBABILITY = 0.1
"""A draft ends before it is less likely than this to be right: vLLM's default for `suffix`."""
TREE_DEPTH = 24
"""Tokens that Arctic matches and drafts at most: vLLM's default."""


@dataclass(frozen=True)
class Drafted:
    """Drafts of a batch, and the processor time of drafting it."""

    drafts: Sequence[Sequence[int]]
    seconds: float


class Drafter(Protocol):
    """Interface of both: learns whole samples, and follows requests that are being sampled."""

    def learn(self, problem: str, generation: int, prompt: Tokens, sample: Tokens) -> float:
        """Learn a sample that is finished; return the processor seconds it took."""

    def open(self, problem: str, generation: int, prompt: Tokens) -> int:
        """Open a request that this version is about to sample; return its number."""

    def sampled(self, request: int, tokens: Tokens) -> None:
        """Learn the tokens that a request got, for its siblings too."""

    def propose(self, requests: Sequence[int]) -> Drafted:
        """Draft for a batch, after all that its requests have."""

    def close(self, request: int) -> None:
        """Finish the request; what it said stays known."""

    def forget(self, generation: int) -> float:
        """Drop a generation, the oldest; return the processor seconds it took."""


@dataclass
class _Request:
    problem: str
    generation: int
    new: list[Tokens]


class NativeDrafter:
    """``paceline.spec.history`` as Paceline's proposer drives it.

    Of a prompt only the last tokens are learned, for the beginnings of its samples to be found by.
    """

    def __init__(self) -> None:
        self._history = History(window=1 << 20, max_bytes=1 << 40)
        self._reader = self._history.reader()
        self._requests: dict[int, _Request] = {}

    def learn(self, problem: str, generation: int, prompt: Tokens, sample: Tokens) -> float:
        """Call ``History.add`` once."""
        text = np.concatenate([prompt[-OVERLAP_TOKENS:], sample])
        started = time.thread_time()
        self._history.add(problem, generation, text)
        return time.thread_time() - started

    def open(self, problem: str, generation: int, prompt: Tokens) -> int:
        """Open a request of the one reader."""
        request = self._reader.open(problem)
        self._requests[request] = _Request(problem, generation, [prompt])
        self._history.extend(problem, generation, str(request), prompt[-OVERLAP_TOKENS:])
        return request

    def sampled(self, request: int, tokens: Tokens) -> None:
        """Call ``History.extend`` once."""
        live = self._requests[request]
        live.new.append(tokens)
        self._history.extend(live.problem, live.generation, str(request), tokens)

    def propose(self, requests: Sequence[int]) -> Drafted:
        """Draft by one native call, which takes the new tokens in too."""
        grown = [np.concatenate(self._requests[request].new) for request in requests]
        arguments = (
            np.array(requests, np.int64),
            np.concatenate(grown),
            np.array([tokens.size for tokens in grown], np.int32),
            np.full(len(requests), MAX_DRAFT, np.int32),
        )
        started = time.thread_time()
        drafts = self._reader.propose_flat(*arguments, MIN_PROBABILITY)
        seconds = time.thread_time() - started
        for request in requests:
            self._requests[request].new.clear()
        return Drafted([drafts.of(row) for row in range(len(requests))], seconds)

    def close(self, request: int) -> None:
        """Close it with the reader, and its sequence in the history."""
        live = self._requests.pop(request)
        self._reader.close(request)
        self._history.end_sequence(live.problem, live.generation, str(request))

    def forget(self, generation: int) -> float:
        """Forget by one call, for all problems."""
        started = time.thread_time()
        self._history.forget(generation + 1)
        return time.thread_time() - started


class ArcticDrafter:
    """``SuffixDecodingCache`` as vLLM's ``suffix`` method drives it, with vLLM's defaults.

    Whole samples go into its global tree directly, without the tree of the request that vLLM would
    build beside it. ``propose`` is vLLM's loop without the look-ups around it: a call a request.
    """

    def __init__(self) -> None:
        try:
            from arctic_inference.suffix_decoding import SuffixDecodingCache
        except ImportError as error:
            raise BenchError(
                "the benchmark compares with arctic-inference, which is not installed: "
                "pip install 'paceline[bench]' (no wheel is published: it is compiled, for minutes)"
            ) from error
        self._cache: Any = SuffixDecodingCache(TREE_DEPTH, max_cached_requests=1 << 30)
        self._num_requests = 0
        self._of_generation: dict[int, list[int]] = {}
        self._contexts: dict[int, Tokens] = {}

    def learn(self, problem: str, generation: int, prompt: Tokens, sample: Tokens) -> float:
        """Add to the tree of all requests, which knows no prompts."""
        request = self._new_request(generation, prompt)
        tree, sequence = self._cache._global_tree, self._cache._req_to_seq_id[request]
        started = time.thread_time()
        tree.extend_ndarray(sequence, sample)
        seconds = time.thread_time() - started
        self._cache.stop_request(request)
        return seconds

    def open(self, problem: str, generation: int, prompt: Tokens) -> int:
        """Begin the request's own tree with its prompt."""
        request = self._new_request(generation, prompt)
        self._contexts[request] = prompt
        return request

    def sampled(self, request: int, tokens: Tokens) -> None:
        """Add to the request's own tree and the one of all."""
        self._cache.add_active_response(request, tokens)
        self._contexts[request] = np.concatenate([self._contexts[request], tokens])[-TREE_DEPTH:]

    def propose(self, requests: Sequence[int]) -> Drafted:
        """Draft by one call a request."""
        contexts = [self._contexts[request] for request in requests]
        speculate = self._cache.speculate
        drafts = []
        started = time.thread_time()
        for request, context in zip(requests, contexts, strict=True):
            drafts.append(
                speculate(
                    request,
                    context,
                    max_spec_tokens=MAX_DRAFT,
                    max_spec_factor=1.0,
                    min_token_prob=MIN_PROBABILITY,
                ).token_ids
            )
        return Drafted(drafts, time.thread_time() - started)

    def close(self, request: int) -> None:
        """Drop the request's own tree."""
        self._cache.stop_request(request)
        del self._contexts[request]

    def forget(self, generation: int) -> float:
        """Evict one response after the other."""
        started = time.thread_time()
        for request in self._of_generation.pop(generation):
            self._cache.evict_cached_response(request)
        return time.thread_time() - started

    def _new_request(self, generation: int, prompt: Tokens) -> int:
        request = self._num_requests
        self._num_requests += 1
        self._cache.start_request(request, prompt)
        self._of_generation.setdefault(generation, []).append(request)
        return request
