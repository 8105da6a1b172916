"""From finished groups to a batch: score, drop what teaches nothing, collect P groups."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from paceline.configs.errors import UserError
from paceline.configs.vocabulary import Group, TrainBatch, TrainSample
from paceline.controller.algorithms import Algorithm
from paceline.controller.buffer import WorkBuffer


class NoSignalError(UserError):
    """Nothing was left to learn from: every group's rewards were equal."""

    def __init__(self, num_groups: int, mean_reward: float) -> None:
        super().__init__(
            f"the last {num_groups} groups all had equal rewards (mean {mean_reward:.2f}): nothing "
            "can be learned from them, the task is solved or too hard for this model"
        )
        self.mean_reward = mean_reward


@dataclass(frozen=True)
class AssembledBatch:
    """A batch with the groups it was made of, and how many were dropped on the way, by reason.

    ``slots`` are the P groups whose slots this step holds: those it trains on and, where it had to
    make do with fewer, dropped ones in their stead. Every step therefore uses up P admissions,
    which is what the freshness bound counts.
    """

    batch: TrainBatch
    groups: tuple[Group, ...]
    slots: tuple[int, ...]
    dropped: Counter[str]

    @property
    def ages(self) -> list[int]:
        """Age of each group's oldest token at this step, in weight versions.

        Demonstrations were sampled by no version: they have no age.
        """
        versions = [group.oldest_version for group in self.groups]
        return [self.batch.step - version for version in versions if version is not None]

    @property
    def max_age(self) -> int:
        """Age of the oldest token in the batch."""
        return max(self.ages, default=0)


class Collector:
    """Collects the groups of one step at a time; ``temperature`` is that of the sampling."""

    def __init__(
        self,
        buffer: WorkBuffer,
        algorithm: Algorithm,
        groups_per_step: int,
        temperature: float = 1.0,
    ) -> None:
        self._buffer = buffer
        self._algorithm = algorithm
        self._groups_per_step = groups_per_step
        self._temperature = temperature

    async def collect(self, step: int) -> AssembledBatch:
        """Take groups until the step has its share; dropped ones free their slot at once.

        After ``max_draws`` times its share a step makes do with what it has.

        Raises:
            NoSignalError: it then has nothing at all.
        """
        kept: list[Group] = []
        held: list[int] = []
        rewards: list[float] = []
        dropped: Counter[str] = Counter()
        num_draws = self._groups_per_step * self._algorithm.max_draws
        for draws_left in reversed(range(num_draws)):
            group = await self._buffer.take()
            assert group is not None, "the buffer was closed under the loop"
            rewards.append(float(group.rewards.mean()))
            if (reason := group.fault or self._algorithm.drop_reason(group)) is None:
                kept.append(group)
            else:
                dropped[reason] += 1
                if len(kept) + len(held) + draws_left < self._groups_per_step:
                    held.append(group.group_id)
                else:
                    await self._buffer.release((group.group_id,))
            if len(kept) + len(held) == self._groups_per_step:
                break
        if not kept:
            raise NoSignalError(num_draws, float(np.mean(rewards)))
        slots = tuple(group.group_id for group in kept) + tuple(held)
        return AssembledBatch(self._train_batch(step, kept), tuple(kept), slots, dropped)

    def _train_batch(self, step: int, groups: list[Group]) -> TrainBatch:
        samples = tuple(
            TrainSample(
                token_ids=trajectory.token_ids,
                loss_mask=trajectory.loss_mask,
                logprobs=trajectory.logprobs,
                advantages=np.where(trajectory.loss_mask, advantage, 0).astype(np.float32),
            )
            for group in groups
            for trajectory, advantage in zip(
                group.trajectories, self._algorithm.advantages(group), strict=True
            )
        )
        group_ids = tuple(group.group_id for group in groups)
        return TrainBatch(step, group_ids, samples, self._temperature)
