"""Draft texts of completions, as a history takes them: by problem and weight version."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray

from paceline.configs.vocabulary import Completion, DraftText

EXTERNAL_VERSION = -1
"""Version of a text that no weights of this run sampled."""
OVERLAP_TOKENS = 8
"""Tokens of context that a text begins with, so that its first tokens can be matched: the end of
the prompt, or of what older weights sampled."""


def problem_name(prompt_token_ids: tuple[int, ...]) -> str:
    """Return a prompt's name in a history: a checksum of its tokens, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(np.array(prompt_token_ids, dtype="<i4").tobytes())


def sampled_texts(
    prompt_token_ids: tuple[int, ...], completion: Completion, first: int = 0
) -> Iterator[DraftText]:
    """Yield the tokens of a completion from token ``first`` on, a text a version, oldest first."""
    tail = np.array(prompt_token_ids[-OVERLAP_TOKENS:], dtype=np.int32)
    tokens = np.concatenate([tail, completion.token_ids])
    for span in completion.versions:
        if span.end > first:
            begin = max(0, len(tail) + max(span.start, first) - OVERLAP_TOKENS)
            part = tokens[begin : len(tail) + span.end]
            yield DraftText(prompt_token_ids, int(span.version), part)


def external_text(prompt_token_ids: tuple[int, ...], token_ids: NDArray[np.int32]) -> DraftText:
    """Return the text of a completion that no weights of this run sampled; int32 [C]."""
    tail = np.array(prompt_token_ids[-OVERLAP_TOKENS:], dtype=np.int32)
    return DraftText(prompt_token_ids, EXTERNAL_VERSION, np.concatenate([tail, token_ids]))
