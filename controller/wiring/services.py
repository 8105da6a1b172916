"""The services of a run, started and ready: grader, learner, rollout workers, teacher."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from paceline.configs.schema import RunConfig
from paceline.configs.vocabulary import SamplingParameters
from paceline.controller.data.tokenizer import decode_completion
from paceline.controller.drafts.publisher import DraftPublisher
from paceline.controller.engines.pool import WorkerPool
from paceline.controller.engines.teacher import Teacher
from paceline.controller.groups.concurrency import gather_or_cancel
from paceline.controller.groups.evaluation import Evaluator
from paceline.controller.groups.generation import Demonstrations, Rollouts, Sampler, sample_to_end
from paceline.controller.parts import Generate
from paceline.controller.ranks.learner_ranks import LearnerRanks
from paceline.controller.wiring.drafting import draft_publisher
from paceline.controller.wiring.preparation import RunInputs
from paceline.controller.wiring.processes import (
    grader_pool,
    start_learner,
    start_pool,
    start_teacher,
)
from paceline.controller.wiring.self_check import check_greedy_tokens
from paceline.reward.pool import GraderPool
from paceline.spec.draft_file import load_draft_texts, save_draft_texts
from paceline.weights_sync.handle import WeightHandle
from paceline.weights_sync.shared_folder import shared_folder

NUM_SELF_CHECK_PROMPTS = 8


@dataclass(frozen=True)
class EngineWeights:
    """Weights go from the learner's memory to every engine."""

    learner: LearnerRanks
    pool: WorkerPool

    async def publish(self, version: int) -> WeightHandle | None:
        """Write a version where engines can read it."""
        return await self.learner.publish(version)

    async def push(self, handle: WeightHandle | None) -> None:
        """Return once every engine serves it."""
        assert handle is not None
        await self.pool.update_weights(handle)


class NoEngines:
    """The weights of a run without engines: demonstrations need none."""

    async def publish(self, version: int) -> WeightHandle | None:
        """Do nothing: there is no reader."""
        return None

    async def push(self, handle: WeightHandle | None) -> None:
        """Do nothing: there is no engine."""


@dataclass(frozen=True)
class Services:
    """Everything a run is made of, started and ready."""

    config: RunConfig
    inputs: RunInputs
    grader: GraderPool
    learner: LearnerRanks
    pool: WorkerPool
    teacher: Teacher | None = None
    draft_publisher: DraftPublisher | None = None

    @property
    def weights(self) -> EngineWeights:
        """The way from learner to engines."""
        return EngineWeights(self.learner, self.pool)

    def rollouts(
        self,
        sample: Sampler,
        sampling: SamplingParameters,
        num_samples: int,
        stream: int,
        segment_tokens: int = 0,
        teach: Teacher | None = None,
    ) -> Rollouts:
        """Build the sampling on the workers and the grading by the pool."""
        return Rollouts(
            sample=sample,
            grade=self.grader.grade,
            decode=functools.partial(
                decode_completion, self.inputs.tokenizer, self.inputs.stop_token_ids
            ),
            sampling=sampling,
            num_samples=num_samples,
            seed=self.config.seed,
            stream=stream,
            segment_tokens=segment_tokens,
            teach=teach,
            require_finish=self.config.reward.require_finish,
            drop_on_error=self.config.reward.on_error == "drop",
        )

    def training_rollouts(self) -> Rollouts:
        """Build rollouts as the configuration's training wants them."""
        rollout = self.config.rollout
        return self.rollouts(
            self.pool.generate,
            rollout.sampling.parameters(self.inputs.stop_token_ids),
            self.config.loop.samples_per_group,
            stream=0,
            segment_tokens=rollout.segment_tokens,
            teach=self.teacher,
        )

    def demonstrations(self) -> Demonstrations:
        """Look up gold completions of the data source."""
        return Demonstrations(self.inputs.prompts.demonstration)

    def training_groups(self) -> Generate:
        """Choose what fills groups in training: samples, or completions of the data source."""
        if self.config.algorithm.type == "sft":
            return self.demonstrations()
        if self.config.algorithm.type == "dpo":
            return Demonstrations(self.inputs.prompts.preference)
        return self.training_rollouts()

    def evaluator(self) -> Evaluator:
        """Build the held-out evaluation, on the same workers."""
        to_the_end = functools.partial(sample_to_end, self.pool.generate)
        return Evaluator(
            functools.partial(self.rollouts, to_the_end),
            self.config.rollout.sampling.max_tokens,
            self.inputs.stop_token_ids,
        )

    async def save_draft_corpus(self, path: str) -> None:
        """Write what engines sampled and others can draft from."""
        assert self.draft_publisher is not None, "nothing is drafted"
        texts = self.draft_publisher.sampled_texts()
        await asyncio.to_thread(save_draft_texts, texts, Path(path))

    async def load_draft_corpus(self, path: Path) -> None:
        """Have engines, before they get weights, draft from what was saved.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        assert self.draft_publisher is not None, "nothing is drafted"
        self.draft_publisher.preload(await asyncio.to_thread(load_draft_texts, path))

    async def self_check(self, label: str) -> int:
        """Count the greedy tokens of every engine that were found equal to the learner's.

        Raises:
            WeightSyncError: one was not.
        """
        return await check_greedy_tokens(
            self.pool,
            self.learner,
            self.inputs.prompts.held_out[:NUM_SELF_CHECK_PROMPTS],
            max_tokens=self.config.rollout.sampling.max_tokens,
            stop_token_ids=self.inputs.stop_token_ids,
            precision=self.config.model.precision,
            label=label,
        )


@contextlib.asynccontextmanager
async def started_services(config: RunConfig, inputs: RunInputs) -> AsyncIterator[Services]:
    """Start grader, learner and rollout workers side by side; stop them at the end.

    Raises:
        UserError: one of them cannot work as configured.
    """
    async with contextlib.AsyncExitStack() as stack:
        weights_folder = stack.enter_context(shared_folder())
        grader = grader_pool(config)
        stack.callback(grader.close)
        publisher = draft_publisher(config, inputs.draft_texts)
        _, learner, pool, teacher = await gather_or_cancel(
            grader.start(),
            start_learner(config, inputs.model_folder, weights_folder, stack),
            start_pool(config, inputs.model_folder, publisher, stack),
            start_teacher(config, stack),
        )
        yield Services(config, inputs, grader, learner, pool, teacher, publisher)
