"""What was sampled so far, bounded: for engines that were not there, and for checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paceline.configs.vocabulary import Trace

Tokens = NDArray[np.int32]


@dataclass
class Problem:
    """What is kept of one prompt: its traces by version. Those below ``floor`` do not come back."""

    generations: dict[int, list[Tokens]] = field(default_factory=dict)
    floor: int | None = None


class TraceArchive:
    """Traces by prompt and weight version, by the rules of the engines' own histories.

    A prompt keeps the newest ``window`` versions that sampled it. All traces together have at most
    ``max_tokens`` tokens: what would exceed them drops the oldest version of any prompt, and a
    version that is the oldest itself makes way with all it holds. Versions leave a prompt whole,
    and what was dropped does not come back while the prompt still has others.
    """

    def __init__(self, window: int, max_tokens: int) -> None:
        self._window = window
        self._max_tokens = max_tokens
        self._problems: dict[tuple[int, ...], Problem] = {}
        self._sizes: dict[int, dict[tuple[int, ...], int]] = {}
        self._forgotten: int | None = None
        self.num_tokens = 0

    def add(self, traces: Iterable[Trace]) -> None:
        """Keep traces, as far as there is a place for them."""
        for trace in traces:
            if self._has_place(trace):
                self._keep(trace)
                self._make_room()

    def add_missing(self, traces: Iterable[Trace]) -> None:
        """Keep those that are not here already; a trace that came twice is here twice."""
        known: dict[tuple[tuple[int, ...], int], Counter[bytes]] = {}
        for trace in traces:
            key = trace.prompt_token_ids, trace.version
            if key not in known:
                problem = self._problems.get(trace.prompt_token_ids, Problem())
                here = problem.generations.get(trace.version, [])
                known[key] = Counter(tokens.tobytes() for tokens in here)
            content = trace.token_ids.tobytes()
            if known[key][content] > 0:
                known[key][content] -= 1
            else:
                self.add([trace])

    def forget(self, before: int) -> None:
        """Drop all versions before this one for good: the policy has drifted too far."""
        self._forgotten = before
        for version in [version for version in self._sizes if version < before]:
            for prompt in list(self._sizes[version]):
                self._drop(prompt, version)

    def __iter__(self) -> Iterator[Trace]:
        """Every trace, the oldest version first, prompt by prompt."""
        for version in sorted(self._sizes):
            for prompt in self._sizes[version]:
                for tokens in self._problems[prompt].generations[version]:
                    yield Trace(prompt, version, tokens)

    def _has_place(self, trace: Trace) -> bool:
        if self._forgotten is not None and trace.version < self._forgotten:
            return False
        problem = self._problems.get(trace.prompt_token_ids)
        if problem is None or trace.version in problem.generations:
            return True
        if problem.floor is not None and trace.version < problem.floor:
            return False
        return len(problem.generations) < self._window or trace.version > min(problem.generations)

    def _keep(self, trace: Trace) -> None:
        prompt, version, num_tokens = trace.prompt_token_ids, trace.version, len(trace.token_ids)
        generations = self._problems.setdefault(prompt, Problem()).generations
        # A copy: a part of a longer array would keep all of it.
        generations.setdefault(version, []).append(trace.token_ids.copy())
        sizes = self._sizes.setdefault(version, {})
        sizes[prompt] = sizes.get(prompt, 0) + num_tokens
        self.num_tokens += num_tokens
        if len(generations) > self._window:
            self._drop(prompt, min(generations))

    def _make_room(self) -> None:
        while self.num_tokens > self._max_tokens:
            oldest = min(self._sizes)
            self._drop(next(iter(self._sizes[oldest])), oldest)

    def _drop(self, prompt: tuple[int, ...], version: int) -> None:
        problem = self._problems[prompt]
        del problem.generations[version]
        problem.floor = version + 1
        sizes = self._sizes[version]
        self.num_tokens -= sizes.pop(prompt)
        if not sizes:
            del self._sizes[version]
        if not problem.generations:
            del self._problems[prompt]
