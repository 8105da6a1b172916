"""The draft corpus, bounded: what was sampled so far, for new engines and for checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paceline.configs.vocabulary import DraftText

Tokens = NDArray[np.int32]


@dataclass
class PromptTexts:
    """Texts of one prompt by version; versions below ``floor`` are not taken any more."""

    by_version: dict[int, list[Tokens]] = field(default_factory=dict)
    floor: int | None = None


class DraftCorpus:
    """Draft texts by prompt and weight version, by the rules of the engines' own histories.

    A prompt keeps the newest ``window`` versions that sampled it. All texts together have at most
    ``max_tokens`` tokens: what would exceed them drops the oldest version of any prompt, and a
    version that is the oldest itself is dropped with all it holds. Versions leave a prompt whole,
    and what was dropped does not come back while the prompt still has others.
    """

    def __init__(self, window: int, max_tokens: int) -> None:
        self._window = window
        self._max_tokens = max_tokens
        self._prompts: dict[tuple[int, ...], PromptTexts] = {}
        self._sizes: dict[int, dict[tuple[int, ...], int]] = {}
        self._dropped_before: int | None = None
        self.num_tokens = 0

    def add(self, texts: Iterable[DraftText]) -> None:
        """Add texts whose versions are within the bounds."""
        for text in texts:
            if self._is_wanted(text):
                self._keep(text)
                self._make_room()

    def add_missing(self, texts: Iterable[DraftText]) -> None:
        """Add texts that are not here already; a text that comes twice is kept twice."""
        known: dict[tuple[tuple[int, ...], int], Counter[bytes]] = {}
        for text in texts:
            key = text.prompt_token_ids, text.version
            if key not in known:
                kept = self._prompts.get(text.prompt_token_ids, PromptTexts())
                here = kept.by_version.get(text.version, [])
                known[key] = Counter(tokens.tobytes() for tokens in here)
            content = text.token_ids.tobytes()
            if known[key][content] > 0:
                known[key][content] -= 1
            else:
                self.add([text])

    def drop_before(self, version: int) -> None:
        """Drop all versions before this one for good: the policy has drifted too far."""
        self._dropped_before = version
        for older in [each for each in self._sizes if each < version]:
            for prompt in list(self._sizes[older]):
                self._drop(prompt, older)

    def __iter__(self) -> Iterator[DraftText]:
        """Yield every text, the oldest version first, prompt by prompt."""
        for version in sorted(self._sizes):
            for prompt in self._sizes[version]:
                for tokens in self._prompts[prompt].by_version[version]:
                    yield DraftText(prompt, version, tokens)

    def _is_wanted(self, text: DraftText) -> bool:
        if self._dropped_before is not None and text.version < self._dropped_before:
            return False
        kept = self._prompts.get(text.prompt_token_ids)
        if kept is None or text.version in kept.by_version:
            return True
        if kept.floor is not None and text.version < kept.floor:
            return False
        return len(kept.by_version) < self._window or text.version > min(kept.by_version)

    def _keep(self, text: DraftText) -> None:
        prompt, version, num_tokens = text.prompt_token_ids, text.version, len(text.token_ids)
        versions = self._prompts.setdefault(prompt, PromptTexts()).by_version
        # A copy: a part of a longer array would keep all of it.
        versions.setdefault(version, []).append(text.token_ids.copy())
        sizes = self._sizes.setdefault(version, {})
        sizes[prompt] = sizes.get(prompt, 0) + num_tokens
        self.num_tokens += num_tokens
        if len(versions) > self._window:
            self._drop(prompt, min(versions))

    def _make_room(self) -> None:
        while self.num_tokens > self._max_tokens:
            oldest = min(self._sizes)
            self._drop(next(iter(self._sizes[oldest])), oldest)

    def _drop(self, prompt: tuple[int, ...], version: int) -> None:
        kept = self._prompts[prompt]
        del kept.by_version[version]
        kept.floor = version + 1
        sizes = self._sizes[version]
        self.num_tokens -= sizes.pop(prompt)
        if not sizes:
            del self._sizes[version]
        if not kept.by_version:
            del self._prompts[prompt]
