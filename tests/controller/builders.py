"""Small prompts, groups and batches for tests of the controller."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.configs.vocabulary import (
    Completion,
    Group,
    Prompt,
    Sample,
    VersionSpan,
    WeightVersion,
)


def make_prompt(index: int) -> Prompt:
    return Prompt(id=f"p{index}", text=f"{index}=", token_ids=(1, 2, 3), reference=str(index))


def make_completion(version: int, length: int = 4) -> Completion:
    return Completion(
        token_ids=np.arange(length, dtype=np.int32),
        logprobs=np.full(length, -1.0, dtype=np.float32),
        versions=(VersionSpan(WeightVersion(version), 0, length),),
        finish_reason="stop",
    )


def make_group(index: int, rewards: Sequence[float] = (0.0, 1.0), version: int = 0) -> Group:
    samples = tuple(Sample(make_completion(version), reward) for reward in rewards)
    return Group(index, make_prompt(index), samples)
