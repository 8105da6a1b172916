"""Do the engines serve what the learner holds? Greedy tokens against the learner's own forward."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from paceline.configs.vocabulary import Group, Prompt, RolloutRequest, Sample, SamplingParameters
from paceline.controller.engines.pool import WorkerPool
from paceline.controller.ranks.learner_ranks import LearnerRanks
from paceline.weights_sync.handle import WeightSyncError

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
"""Logit gap under which two tokens count as tied, by precision."""


async def check_greedy_tokens(
    pool: WorkerPool,
    learner: LearnerRanks,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    stop_token_ids: tuple[int, ...],
    precision: str,
    label: str,
) -> int:
    """Sample the prompts greedily on every worker and count tokens checked.

    Raises:
        WeightSyncError: a worker's token is not the learner's argmax: it serves other weights.
    """
    sampling = SamplingParameters(0.0, max_tokens=max_tokens, stop_token_ids=stop_token_ids)
    requests = [
        RolloutRequest(f"self-check-{label}-{index}", prompt.token_ids, sampling, 1, seed=0)
        for index, prompt in enumerate(prompts)
    ]
    per_worker = await asyncio.gather(*(pool.generate_everywhere(request) for request in requests))
    groups = [
        Group(index, prompt, (Sample(completion),))
        for index, (prompt, answers) in enumerate(zip(prompts, per_worker, strict=True))
        for (completion,) in answers
    ]
    if not groups:
        return 0  # every worker died over it
    mismatches = await learner.greedy_mismatches(groups, TOLERANCES[precision])
    if mismatches:
        raise WeightSyncError(
            f"{label}: {mismatches} greedy tokens of the engines are not the learner's argmax: "
            "they serve other weights, or vLLM and transformers disagree on this model"
        )
    return sum(sample.num_tokens for group in groups for sample in group.samples)
