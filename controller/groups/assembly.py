"""From finished groups to a batch: drop what teaches nothing, collect P groups."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from paceline.configs.errors import UserError
from paceline.configs.vocabulary import Group, Prompt, TrainBatch, TrainSample
from paceline.controller.data.curriculum import Outcome
from paceline.controller.groups.buffer import WorkBuffer
from paceline.controller.groups.signal_filter import SignalFilter
from paceline.controller.ledger.events import Kind
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.state import Batch


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

    ``outcomes`` are those of all groups that were graded, dropped ones too, in order of admission.
    """

    batch: TrainBatch
    groups: tuple[Group, ...]
    slots: tuple[int, ...]
    dropped: Counter[str]
    outcomes: tuple[Outcome, ...] = ()

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


@dataclass(frozen=True)
class RecordedBatch:
    """A batch as the ledger has it, with its groups.

    ``prompts`` are those of dropped groups whose rewards it has, by id.
    """

    batch: Batch
    groups: tuple[Group, ...]
    prompts: Mapping[int, Prompt] = field(default_factory=dict)


class Collector:
    """Collects the groups of one step at a time; ``temperature`` is that of the sampling.

    ``recorded`` batches come first, as they were: those steps are done again.
    """

    def __init__(
        self,
        buffer: WorkBuffer,
        journal: Journal,
        signal: SignalFilter,
        groups_per_step: int,
        temperature: float = 1.0,
        recorded: Sequence[RecordedBatch] = (),
    ) -> None:
        self._recorded = deque(recorded)
        self._buffer = buffer
        self._journal = journal
        self._signal = signal
        self._groups_per_step = groups_per_step
        self._temperature = temperature

    async def collect(self, step: int) -> AssembledBatch:
        """Take groups until the step has its share.

        After ``max_draws`` times its share a step trains on fewer groups and holds the slots of
        dropped ones in their stead. Dropped groups beyond those free their slots at once.

        Raises:
            NoSignalError: it then has nothing at all.
        """
        if self._recorded:
            return self._again(step, self._recorded.popleft())
        kept: list[Group] = []
        held: list[int] = []
        rewards: dict[int, float] = {}
        prompts: dict[int, Prompt] = {}
        dropped: dict[int, str] = {}
        num_draws = self._groups_per_step * self._signal.max_draws
        for draws_left in reversed(range(num_draws)):
            group = await self._buffer.take()
            assert group is not None, "the buffer was closed under the loop"
            rewards[group.group_id] = float(group.rewards.mean())
            if (reason := self._signal.drop_reason(group)) is None:
                kept.append(group)
            else:
                dropped[group.group_id] = reason
                if group.fault is None:
                    prompts[group.group_id] = group.prompt
                if len(kept) + len(held) + draws_left < self._groups_per_step:
                    held.append(group.group_id)
                else:
                    await self._buffer.release((group.group_id,))
            if len(kept) + len(held) == self._groups_per_step:
                break
        if not kept:
            for group_id, reason in dropped.items():
                self._journal.note(Kind.SET_ASIDE, group_id, {"reason": reason})
            raise NoSignalError(num_draws, float(np.mean(list(rewards.values()))))
        batch = Batch(
            step,
            tuple(group.group_id for group in kept),
            tuple(held),
            dropped,
            {group_id: rewards[group_id] for group_id in prompts},
        )
        await self._journal.write(Kind.BATCHED, step, batch.as_detail())
        return self._assembled(RecordedBatch(batch, tuple(kept), prompts))

    def _again(self, step: int, recorded: RecordedBatch) -> AssembledBatch:
        assert recorded.batch.step == step, f"step {step} got step {recorded.batch.step} again"
        return self._assembled(recorded)

    def _assembled(self, recorded: RecordedBatch) -> AssembledBatch:
        batch, groups = recorded.batch, recorded.groups
        train_batch = self._train_batch(batch.step, groups)
        dropped = Counter(batch.dropped.values())
        return AssembledBatch(train_batch, groups, batch.slots, dropped, _outcomes(recorded))

    def _train_batch(self, step: int, groups: Sequence[Group]) -> TrainBatch:
        samples = tuple(
            TrainSample(
                token_ids=trajectory.token_ids,
                loss_mask=trajectory.loss_mask,
                logprobs=trajectory.logprobs,
                reward=trajectory.reward,
                group=index,
                versions=trajectory.versions,
                teacher_logprobs=trajectory.teacher_logprobs,
                routed_experts=trajectory.routed_experts,
            )
            for index, group in enumerate(groups)
            for trajectory in group.trajectories
        )
        group_ids = tuple(group.group_id for group in groups)
        return TrainBatch(step, group_ids, samples, self._temperature)


def _outcomes(recorded: RecordedBatch) -> tuple[Outcome, ...]:
    rewards = recorded.batch.rewards
    by_id = {i: Outcome(prompt, rewards[i]) for i, prompt in recorded.prompts.items()}
    for group in recorded.groups:
        by_id[group.group_id] = Outcome(group.prompt, float(group.rewards.mean()))
    return tuple(by_id[group_id] for group_id in sorted(by_id))
