"""From an interrupted run's ledger to what the loop goes on with.

The learner goes back to its checkpoint; the ledger knows what was trained after it. Those steps are
done again, from the very batches that were recorded, so the weights they make are again those that
sampled what comes after them. Finished groups wait in the buffer as they did; what was only
admitted or claimed is sampled anew, once as much room is free as there was when it was admitted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from paceline.configs.errors import ConfigError
from paceline.configs.schema import RunConfig
from paceline.configs.schema.run import given_completions
from paceline.configs.vocabulary import Group, Prompt
from paceline.controller.groups.assembly import RecordedBatch
from paceline.controller.groups.buffer import State, Work
from paceline.controller.ledger.events import Kind, LedgerError
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.state import LedgerState, Status
from paceline.controller.run.checkpoints import RunState

PromptAt = Callable[[int], Prompt]
"""The training prompt at a position of the feed."""


@dataclass(frozen=True)
class Recovered:
    """Batches to train again, in order; entries of the buffer; where the feed goes on."""

    batches: tuple[RecordedBatch, ...] = ()
    works: tuple[Work, ...] = ()
    next_position: int = 0

    @property
    def groups(self) -> Iterator[Group]:
        """All that were finished and are not trained for good."""
        for recorded in self.batches:
            yield from recorded.groups
        yield from (work.group for work in self.works if work.group is not None)

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots that the recorded batches hold."""
        return tuple(slot for recorded in self.batches for slot in recorded.batch.slots)

    def __str__(self) -> str:
        finished = sum(work.state is State.FINISHED for work in self.works)
        return (
            f"{len(self.batches)} recorded batches and {finished} finished groups from the ledger, "
            f"{len(self.works) - finished} groups to be sampled"
        )


def require_empty(journal: Journal, name: str) -> None:
    """Refuse to begin a run in a ledger that holds one.

    Raises:
        LedgerError: it does.
    """
    if journal.state.admitted:
        raise LedgerError(
            f"the ledger already holds {journal.state.admitted} groups of a run {name}: continue "
            "it with --resume if it has a checkpoint, else choose another name"
        )


async def recover(
    journal: Journal, checkpoint: RunState, prompt_at: PromptAt, *, fits: bool
) -> Recovered:
    """Take the ledger back to a checkpoint and find what is to be done.

    ``fits`` is False where the settings that sampled the finished groups changed: they are
    then dropped with that reason.

    Raises:
        LedgerError: ledger and checkpoint do not belong together, or samples are lost.
        ConfigError: settings changed, and there are steps to train again.
    """
    if not journal.state.admitted:
        return recovered_without_ledger(journal, checkpoint, prompt_at)
    state = journal.state
    if not fits:
        require_nothing_trained_since(checkpoint.step, state)
    await journal.write(Kind.RESUMED, checkpoint.step, {"keep_batches": fits})
    if not fits:
        for group_id in state.with_status(Status.FINISHED):
            journal.note(Kind.SET_ASIDE, group_id, {"reason": "settings_changed"})
        await journal.flush()

    def read(group_id: int) -> Group:
        return journal.store.group(group_id, prompt_at(group_id))

    def load() -> Recovered:
        return Recovered(
            tuple(
                RecordedBatch(
                    batch,
                    tuple(map(read, batch.trained)),
                    {group_id: prompt_at(group_id) for group_id in batch.rewards},
                )
                for batch in state.untrained_batches()
            ),
            tuple(
                Work(i, group.prompt, State.FINISHED, group)
                for i, group in ((i, read(i)) for i in state.with_status(Status.FINISHED))
            )
            + tuple(Work(i, prompt_at(i)) for i in state.with_status(Status.WAITING)),
            max(state.last + 1, int(checkpoint.feed["position"])),
        )

    return await asyncio.to_thread(load)


def require_nothing_trained_since(step: int, state: LedgerState) -> None:
    """Refuse other settings where steps are to be done again as they were.

    Raises:
        ConfigError: there are such steps.
    """
    since = [done for done in state.checksums if done >= step]
    if since:
        raise ConfigError(
            f"--resume: {len(since)} steps after the checkpoint must be trained again as they "
            "were, but settings of loop, rollout.sampling, reward or teacher changed: resume with "
            "the settings of config.yaml first"
        )


def recovered_without_ledger(
    journal: Journal, checkpoint: RunState, prompt_at: PromptAt
) -> Recovered:
    """Return what was in flight at the checkpoint, to be sampled again: nothing else is known."""
    journal.begin(checkpoint.step)
    works = tuple(Work(position, prompt_at(position)) for position in checkpoint.pending)
    for work in works:
        journal.note(Kind.ADMITTED, work.group_id, {"prompt": work.prompt.id})
    return Recovered((), works, int(checkpoint.feed["position"]))


def groups_fit(previous: RunConfig, config: RunConfig) -> bool:
    """Return whether groups sampled under one configuration may be trained under the other."""
    before, now = previous.loop, config.loop
    return (
        (previous.rollout.sampling, previous.reward) == (config.rollout.sampling, config.reward)
        and before.groups_per_step == now.groups_per_step
        and before.samples_per_group == now.samples_per_group
        and before.window_fraction == now.window_fraction
        and before.max_lag <= now.max_lag
        and teacher_path(previous) == teacher_path(config)
        and given_completions(previous.algorithm) == given_completions(config.algorithm)
    )


def teacher_path(config: RunConfig) -> str | None:
    """Return the model whose scores are part of finished groups."""
    return None if config.teacher is None else config.teacher.path
