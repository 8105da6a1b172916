"""What engines sampled, as a history takes it: named by problem, split by weight version."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray

from paceline.configs.vocabulary import Completion, Trace

GIVEN_VERSION = -1
OVERLAP_TOKENS = 8
"""Tokens that a part begins with although others said them, so that its beginning is found: the end
of the prompt, or what was sampled before the weights were switched."""


def problem_name(prompt_token_ids: tuple[int, ...]) -> str:
    """The name of a prompt in a history: a checksum of its tokens, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(np.array(prompt_token_ids, dtype="<i4").tobytes())


def traces_of(
    prompt_token_ids: tuple[int, ...], completion: Completion, first: int = 0
) -> Iterator[Trace]:
    """What a turn sampled, from token ``first`` on: a trace a weight version, oldest first."""
    tail = np.array(prompt_token_ids[-OVERLAP_TOKENS:], dtype=np.int32)
    tokens = np.concatenate([tail, completion.token_ids])
    for span in completion.versions:
        if span.end > first:
            begin = max(0, len(tail) + max(span.start, first) - OVERLAP_TOKENS)
            part = tokens[begin : len(tail) + span.end]
            yield Trace(prompt_token_ids, int(span.version), part)


def given_trace(prompt_token_ids: tuple[int, ...], token_ids: NDArray[np.int32]) -> Trace:
    """A completion that no weights of this run sampled."""
    tail = np.array(prompt_token_ids[-OVERLAP_TOKENS:], dtype=np.int32)
    return Trace(prompt_token_ids, GIVEN_VERSION, np.concatenate([tail, token_ids]))
