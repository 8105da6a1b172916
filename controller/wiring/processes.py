"""Starts the processes of a run: graders, learner ranks, rollout workers, the teacher's workers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paceline.configs.schema import RunConfig
from paceline.configs.schema.algorithm import critic_of
from paceline.configs.schema.data import ReasoningGymSource
from paceline.configs.schema.reward import ExactGrader, MathGrader, ReasoningGymGrader
from paceline.configs.schema.rollout import RolloutConfig
from paceline.controller.cluster.actors import LateClass
from paceline.controller.drafts.publisher import DraftPublisher
from paceline.controller.engines.pool import WorkerPool
from paceline.controller.engines.routing import most_samples
from paceline.controller.engines.teacher import FIXED, FixedWeightsActor, Teacher
from paceline.controller.engines.watching import TimeLimits
from paceline.controller.engines.worker_actor import RolloutActor, start_rollout_worker
from paceline.controller.groups.concurrency import gather_or_cancel
from paceline.controller.ranks.learner_ranks import LearnerRanks, start_learner_ranks
from paceline.controller.wiring.drafting import with_draft_budget
from paceline.reward.exact import ExactAnswerGrader
from paceline.reward.grader import Grader
from paceline.reward.imported import build_imported_grader
from paceline.reward.math_answer import MathAnswerGrader
from paceline.reward.pool import GraderPool
from paceline.reward.reasoning_gym_task import ReasoningGymTaskGrader
from paceline.rollout.process_environment import engine_environment
from paceline.rollout.worker import RolloutWorker

LEARNER_WORKER = LateClass("paceline.learner.worker:LearnerWorker")
VLLM_ENGINE = LateClass("paceline.rollout.vllm_engine:VLLMEngine")
CPU_LEARNER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Keep what a step frees: returning it to the system and faulting it in again cost 6% of a step.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}


def grader_pool(config: RunConfig) -> GraderPool:
    """Return the configured grader in processes of its own."""
    reward, source = config.reward, config.data.source
    factory: Callable[[], Grader]
    if isinstance(reward, ReasoningGymGrader):
        assert isinstance(source, ReasoningGymSource), "the schema pairs them"
        factory = functools.partial(
            ReasoningGymTaskGrader, source.task, source.parameters, reward.threshold
        )
    elif isinstance(reward, ExactGrader):
        factory = functools.partial(ExactAnswerGrader, reward.pattern, reward.ignore_case)
    elif isinstance(reward, MathGrader):
        factory = MathAnswerGrader
    else:
        factory = functools.partial(build_imported_grader, reward.import_path, reward.parameters)
    return GraderPool(factory, reward.num_processes, reward.time_limit_seconds)


async def start_learner(
    config: RunConfig, model_folder: str, weights_folder: str, stack: contextlib.AsyncExitStack
) -> LearnerRanks:
    """Start the learner's ranks and see to their end."""
    learner = config.learner
    factory = functools.partial(
        LEARNER_WORKER,
        model_folder,
        config.model,
        learner,
        critic_of(config.algorithm),
        weights_folder=weights_folder,
        seed=config.seed,
    )
    ranks = await start_learner_ranks(
        factory,
        learner.num_ranks,
        cpus=learner.cpus_per_rank,
        gpus=learner.gpus_per_rank,
        environment={} if learner.gpus_per_rank else CPU_LEARNER_ENVIRONMENT,
        hang_seconds=learner.longest_wait_seconds,
        reports=Path(config.output_dir) / config.name,
        placement=learner.placement,
    )
    stack.push_async_callback(ranks.close)
    return ranks


async def start_pool(
    config: RunConfig,
    model_folder: str,
    publisher: DraftPublisher | None,
    stack: contextlib.AsyncExitStack,
) -> WorkerPool:
    """Start the rollout workers and see to their end."""
    rollout = with_draft_budget(config)
    engine = functools.partial(
        VLLM_ENGINE,
        model_folder,
        rollout,
        max_length=config.model.max_length,
        dtype=config.model.precision,
        seed=config.seed,
    )
    return await start_engines(rollout, engine, RolloutActor, stack, publisher)


async def start_teacher(config: RunConfig, stack: contextlib.AsyncExitStack) -> Teacher | None:
    """Start the teacher's workers, where there is one, and see to their end."""
    if config.teacher is None:
        return None
    rollout = config.teacher.as_rollout()
    engine = functools.partial(
        VLLM_ENGINE,
        config.teacher.path,
        rollout,
        max_length=config.model.max_length,
        dtype=config.model.precision,
        seed=config.seed,
        fixed_version=FIXED.version,
    )
    pool = await start_engines(rollout, engine, FixedWeightsActor, stack)
    await pool.update_weights(FIXED)
    return Teacher(pool.generate)


async def start_engines(
    rollout: RolloutConfig,
    engine: Callable[[], Any],
    handle_class: type[RolloutActor],
    stack: contextlib.AsyncExitStack,
    publisher: DraftPublisher | None = None,
) -> WorkerPool:
    """Start workers with an engine each, and see to their end."""
    max_samples = most_samples(rollout.max_num_seqs)

    async def start(index: int) -> RolloutActor:
        return await start_rollout_worker(
            index,
            RolloutWorker,
            engine,
            cpus=rollout.cpus_per_worker,
            gpus=rollout.gpus_per_worker,
            environment=engine_environment(on_gpu=rollout.gpus_per_worker > 0),
            max_requests=max_samples,
            handle_class=handle_class,
        )

    workers = await gather_or_cancel(*(start(index) for index in range(rollout.num_workers)))
    pool = WorkerPool(
        workers,
        start,
        max_restarts=rollout.max_restarts,
        max_samples=max_samples,
        limits=TimeLimits(rollout.claim_seconds, rollout.answer_seconds),
        section=handle_class.section,
        draft_publisher=publisher,
    )
    stack.push_async_callback(pool.close)
    return pool


def max_claims(config: RunConfig) -> int:
    """Return how many groups may be with the workers: twice what their engines decode together.

    What does not run yet is being sent, waiting in the pool, or being graded.
    """
    rollout = config.rollout
    groups_an_engine = max(1, rollout.max_num_seqs // config.loop.samples_per_group)
    return 2 * rollout.num_workers * groups_an_engine
