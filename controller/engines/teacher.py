"""A teacher behind the same pool as the policy's workers: to score is a request like any other."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from paceline.configs.errors import ClusterError
from paceline.configs.vocabulary import (
    Completion,
    Prompt,
    RolloutRequest,
    SamplingParameters,
    WeightVersion,
)
from paceline.controller.engines.worker_actor import RolloutActor
from paceline.controller.groups.buffer import WorkerLost
from paceline.weights_sync.handle import Acknowledgement, WeightHandle
from paceline.weights_sync.layout import Layout

FIXED = WeightHandle(WeightVersion(0), path="", checksum=0, layout=Layout(()))
"""The one version of a model that does not change: every engine has it from the start."""


MAX_FRUITLESS = 3
"""Requests in a row that may run out of time with nothing scored before the run ends."""


class FixedWeightsActor(RolloutActor):
    """A worker whose engine serves the weights that it was built with."""

    section = "teacher"

    async def update_weights(self, handle: WeightHandle) -> Acknowledgement:
        """Acknowledge the version it has; others never come."""
        assert handle is FIXED, "a teacher is not trained"
        return handle.version, handle.checksum


def is_scored(completion: Completion) -> bool:
    """Return whether a completion's log-probabilities are the teacher's."""
    return completion.finish_reason != "abort"


@dataclass
class Teacher:
    """Scorer of completions by the teacher's model, through its pool."""

    generate: Callable[[RolloutRequest], Awaitable[tuple[Completion, ...]]]
    _attempts: Iterator[int] = field(default_factory=itertools.count)

    async def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[np.ndarray]:
        """Return log-probabilities float32 [C] of each completion's tokens, at temperature 1.

        Completions that a lost or slow worker did not score are requested again: no sample is lost.

        Raises:
            ClusterError: workers were lost more often than they may be replaced, or none of them
                scores a single completion in the time it has.
        """
        found: dict[int, np.ndarray] = {}
        num_fruitless = 0
        while missing := [i for i in range(len(completions)) if i not in found]:
            if num_fruitless == MAX_FRUITLESS:
                raise ClusterError(
                    f"the teacher scored none of {len(missing)} completions within "
                    f"teacher.claim_seconds, {MAX_FRUITLESS} times in a row: raise it, or "
                    "teacher.num_workers"
                )
            request = self._request(prompt, tuple(completions[i] for i in missing))
            with contextlib.suppress(WorkerLost):
                answers = zip(missing, await self.generate(request), strict=True)
                new = {i: scored.logprobs for i, scored in answers if is_scored(scored)}
                num_fruitless = 0 if new else num_fruitless + 1
                found |= new
        return [found[i] for i in range(len(completions))]

    def _request(self, prompt: Prompt, completions: tuple[Completion, ...]) -> RolloutRequest:
        longest = max(len(completion.token_ids) for completion in completions)
        return RolloutRequest(
            request_id=f"score-{next(self._attempts)}",
            prompt_token_ids=prompt.token_ids,
            sampling=SamplingParameters(max_tokens=longest),
            num_samples=len(completions),
            seed=0,
            partial=completions,
            scores=True,
        )
