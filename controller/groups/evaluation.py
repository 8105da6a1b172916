"""Accuracy on prompts that are never trained on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from paceline.configs.vocabulary import Group, Prompt, SamplingParameters, Trajectory
from paceline.controller.groups.buffer import Work, WorkerLost
from paceline.controller.groups.generation import Rollouts

GREEDY_STREAM, SAMPLED_STREAM = 1, 2
"""Random streams of evaluation, apart from training's stream 0."""


@dataclass(frozen=True)
class Evaluator:
    """Samples one completion a prompt as training does, but to its end (`sample_to_end`).

    ``rollouts(sampling, num_samples, stream)`` builds what does it.
    """

    rollouts: Callable[[SamplingParameters, int, int], Rollouts]
    max_tokens: int
    stop_token_ids: tuple[int, ...]

    async def greedy(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        """One graded completion a prompt at temperature 0."""
        return await self._run(prompts, 0.0, GREEDY_STREAM)

    async def sampled(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        """One graded completion a prompt at temperature 1, the same random streams every time."""
        return await self._run(prompts, 1.0, SAMPLED_STREAM)

    async def _run(
        self, prompts: Sequence[Prompt], temperature: float, stream: int
    ) -> list[Trajectory]:
        sampling = SamplingParameters(
            temperature=temperature, max_tokens=self.max_tokens, stop_token_ids=self.stop_token_ids
        )
        rollouts = self.rollouts(sampling, 1, stream)
        groups = await asyncio.gather(
            *(retried(rollouts, Work(index, prompt)) for index, prompt in enumerate(prompts))
        )
        return [group.trajectories[0] for group in groups]


async def retried(rollouts: Rollouts, work: Work) -> Group:
    """A group, from another worker where one died; the pool ends it when none is left."""
    while True:
        with contextlib.suppress(WorkerLost):
            group = await rollouts(work)
            assert isinstance(group, Group), "what evaluates samples to the end"
            return group


def accuracy(trajectories: Sequence[Trajectory]) -> float:
    """Mean reward."""
    return float(np.mean([trajectory.reward for trajectory in trajectories]))
