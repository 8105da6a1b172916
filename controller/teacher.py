"""A teacher behind the same pool as the policy's workers: what it scores is a request like any."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from paceline.configs.vocabulary import (
    Completion,
    Prompt,
    RolloutRequest,
    SamplingParameters,
    WeightVersion,
)
from paceline.controller.actors import RolloutActor
from paceline.controller.parts import WorkerLost
from paceline.weights_sync.handle import WeightHandle
from paceline.weights_sync.layout import Layout

FIXED = WeightHandle(WeightVersion(0), path="", checksum=0, layout=Layout(()))
"""The one version of a model that does not change: every engine has it from the start."""


class FixedWeightsActor(RolloutActor):
    """A worker whose engine serves the weights that it was built with."""

    async def update_weights(self, handle: WeightHandle) -> tuple[WeightVersion, int]:
        """Acknowledge the version it has; others never come."""
        assert handle is FIXED, "a teacher is not trained"
        return handle.version, handle.checksum


@dataclass
class Teacher:
    """Asks the pool what its model thinks of completions."""

    generate: Callable[[RolloutRequest], Awaitable[tuple[Completion, ...]]]
    _attempts: Iterator[int] = field(default_factory=itertools.count)

    async def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[np.ndarray]:
        """Log-probabilities float32 [C] of each completion's tokens, at temperature 1.

        A worker that is lost over it, or too slow, is asked again: what was sampled is not lost.

        Raises:
            ClusterError: workers were lost more often than they may be replaced.
        """
        longest = max(len(completion.token_ids) for completion in completions)
        while True:
            request = RolloutRequest(
                request_id=f"score-{next(self._attempts)}",
                prompt_token_ids=prompt.token_ids,
                sampling=SamplingParameters(max_tokens=longest),
                num_samples=len(completions),
                seed=0,
                partial=tuple(completions),
                scores=True,
            )
            try:
                scored = await self.generate(request)
            except WorkerLost:
                continue
            if all(completion.finish_reason != "abort" for completion in scored):
                return [completion.logprobs for completion in scored]
