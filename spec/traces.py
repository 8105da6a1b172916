"""What engines sampled, as a history takes it: named by problem, split by weight version."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash

from paceline.configs.vocabulary import Completion, Trace

OVERLAP_TOKENS = 16
"""Tokens before a switch of weights that the new version's part begins with, for it to be found."""


def problem_name(prompt_token_ids: tuple[int, ...]) -> str:
    """The name of a prompt in a history: a checksum of its tokens, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(np.array(prompt_token_ids, dtype="<i4").tobytes())


def traces_of(
    prompt_token_ids: tuple[int, ...], completion: Completion, first: int = 0
) -> Iterator[Trace]:
    """What a turn sampled, from token ``first`` on: a trace a weight version, oldest first."""
    for span in completion.versions:
        if span.end > first:
            begin = max(0, span.start - OVERLAP_TOKENS, first - OVERLAP_TOKENS)
            yield Trace(prompt_token_ids, int(span.version), completion.token_ids[begin : span.end])
