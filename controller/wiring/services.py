"""From a configuration to the parts of a run: the only module that names concrete classes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from paceline.configs.schema import RunConfig
from paceline.configs.schema.algorithm import critic_of
from paceline.configs.schema.data import DatasetSource, ReasoningGymSource
from paceline.configs.schema.reward import ExactGrader, MathGrader, ReasoningGymGrader
from paceline.configs.schema.rollout import RolloutConfig
from paceline.configs.schema.run import given_completions
from paceline.configs.vocabulary import DraftText, SamplingParameters
from paceline.controller.data.prompts import PromptRenderer, PromptSet
from paceline.controller.data.sources import (
    DatasetPromptSource,
    PromptSource,
    load_imported_source,
)
from paceline.controller.data.tokenizer import (
    decode_completion,
    encode,
    load_tokenizer,
    stop_token_ids,
)
from paceline.controller.drafts.blocks import put_block
from paceline.controller.drafts.corpus import DraftCorpus
from paceline.controller.drafts.files import DraftFileReader
from paceline.controller.drafts.publisher import DraftPublisher
from paceline.controller.engines.pool import WorkerPool
from paceline.controller.engines.routing import most_samples
from paceline.controller.engines.teacher import FIXED, FixedWeightsActor, Teacher
from paceline.controller.engines.watching import TimeLimits
from paceline.controller.engines.worker_actor import LateClass, RolloutActor, start_rollout_worker
from paceline.controller.groups.concurrency import gather_or_cancel
from paceline.controller.groups.evaluation import Evaluator
from paceline.controller.groups.generation import Demonstrations, Rollouts, Sample, sample_to_end
from paceline.controller.parts import Generate
from paceline.controller.ranks.learner_ranks import LearnerRanks, start_learner_ranks
from paceline.controller.wiring.self_check import check_greedy_tokens
from paceline.learner.checkpoints import checkpoint
from paceline.learner.model.model import (
    empty_policy,
    require_same_vocabulary,
    write_initial_model,
)
from paceline.reward.exact import ExactAnswerGrader
from paceline.reward.grader import Grader
from paceline.reward.imported import build_imported_grader
from paceline.reward.math_answer import MathAnswerGrader
from paceline.reward.pool import GraderPool
from paceline.reward.reasoning_gym_task import ReasoningGymTaskGrader, ReasoningGymTaskSource
from paceline.rollout.process_environment import engine_environment
from paceline.spec.draft_file import load_draft_texts, save_draft_texts
from paceline.weights_sync.handle import WeightHandle
from paceline.weights_sync.shared_folder import shared_folder

LEARNER_WORKER = LateClass("paceline.learner.worker:LearnerWorker")
ROLLOUT_WORKER = LateClass("paceline.rollout.worker:RolloutWorker")
VLLM_ENGINE = LateClass("paceline.rollout.vllm_engine:VLLMEngine")

NUM_SELF_CHECK_PROMPTS = 8
DRAFTER_BYTES_PER_TOKEN = 60
"""About what an engine's drafter needs for a token: what it has no room for is not kept for it."""
CPU_LEARNER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Keep what a step frees: returning it to the system and faulting it in again cost 6% of a step.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}


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
    """Nobody samples: demonstrations need no weights."""

    async def publish(self, version: int) -> WeightHandle | None:
        """Nothing to write."""
        return None

    async def push(self, handle: WeightHandle | None) -> None:
        """Nobody to serve."""


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of, started and ready."""

    config: RunConfig
    prepared: Preparation
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
        sample: Sample,
        sampling: SamplingParameters,
        num_samples: int,
        stream: int,
        segment_tokens: int = 0,
    ) -> Rollouts:
        """Sampling on the workers and grading by the pool."""
        return Rollouts(
            sample=sample,
            grade=self.grader.grade,
            decode=functools.partial(
                decode_completion, self.prepared.tokenizer, self.prepared.stop_token_ids
            ),
            sampling=sampling,
            num_samples=num_samples,
            seed=self.config.seed,
            stream=stream,
            segment_tokens=segment_tokens,
            require_finish=self.config.reward.require_finish,
            drop_on_error=self.config.reward.on_error == "drop",
        )

    def training_rollouts(self) -> Rollouts:
        """Rollouts as the configuration's training wants them."""
        rollout = self.config.rollout
        rollouts = self.rollouts(
            self.pool.generate,
            rollout.sampling.parameters(self.prepared.stop_token_ids),
            self.config.loop.samples_per_group,
            stream=0,
            segment_tokens=rollout.segment_tokens,
        )
        return replace(rollouts, teach=self.teacher)

    def demonstrations(self) -> Demonstrations:
        """Gold completions of the data source."""
        return Demonstrations(self.prepared.prompts.demonstration)

    def training_groups(self) -> Generate:
        """What fills groups in training: samples, or completions of the data source."""
        if self.config.algorithm.type == "sft":
            return self.demonstrations()
        if self.config.algorithm.type == "dpo":
            return Demonstrations(self.prepared.prompts.preference)
        return self.training_rollouts()

    def evaluator(self) -> Evaluator:
        """Held-out evaluation on the same workers."""
        to_the_end = functools.partial(sample_to_end, self.pool.generate)
        return Evaluator(
            functools.partial(self.rollouts, to_the_end),
            self.config.rollout.sampling.max_tokens,
            self.prepared.stop_token_ids,
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
        """How many greedy tokens of every engine were found equal to the learner's.

        Raises:
            WeightSyncError: one was not.
        """
        return await check_greedy_tokens(
            self.pool,
            self.learner,
            self.prepared.prompts.held_out[:NUM_SELF_CHECK_PROMPTS],
            max_tokens=self.config.rollout.sampling.max_tokens,
            stop_token_ids=self.prepared.stop_token_ids,
            precision=self.config.model.precision,
            label=label,
        )


def training_temperature(config: RunConfig) -> float:
    """That of the learner's log-probabilities: as in sampling, or 1 where nothing is sampled."""
    is_sampled = given_completions(config.algorithm) is None
    return config.rollout.sampling.temperature if is_sampled else 1.0


def max_claims(config: RunConfig) -> int:
    """Groups that may be with the workers: twice what their engines decode together.

    What does not run yet is being sent, waiting in the pool, or being graded.
    """
    rollout = config.rollout
    groups_an_engine = max(1, rollout.max_num_seqs // config.loop.samples_per_group)
    return 2 * rollout.num_workers * groups_an_engine


def prompt_source(config: RunConfig, split: str | None = None) -> PromptSource:
    """The configured source; ``split`` names another split of a dataset."""
    source = config.data.source
    if isinstance(source, ReasoningGymSource):
        return ReasoningGymTaskSource(source.task, source.parameters, config.data.seed)
    if isinstance(source, DatasetSource):
        return DatasetPromptSource(source, split or source.split, config.data.seed)
    return load_imported_source(source.import_path, source.parameters)


def prompt_set(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Held-out, validation and training prompts."""
    source = config.data.source
    held_out_split = source.held_out_split if isinstance(source, DatasetSource) else None
    max_tokens = config.rollout.sampling.max_tokens
    return PromptSet(
        prompt_source(config),
        PromptRenderer(source, tokenizer, config.model.max_length, max_tokens),
        config.data.num_held_out,
        config.warm_start.num_validation if config.warm_start else 0,
        prompt_source(config, held_out_split) if held_out_split else None,
        config.data.curriculum,
        config.data.seed,
    )


def grader_pool(config: RunConfig) -> GraderPool:
    """The configured grader in processes of its own."""
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


@dataclass(frozen=True)
class Preparation:
    """What can be known, and can be wrong, before any process is started."""

    tokenizer: PreTrainedTokenizerBase
    model_folder: str
    stop_token_ids: tuple[int, ...]
    prompts: PromptSet
    draft_texts: tuple[DraftText, ...] = ()


def prepare(config: RunConfig, initial_folder: Path) -> Preparation:
    """Load tokenizer, model configuration and prompts.

    ``initial_folder`` receives the initial model where the configuration gives an architecture.

    Raises:
        UserError: one of them is missing, unreadable or does not fit the others.
    """
    tokenizer = load_tokenizer(config.model)
    eos = int(tokenizer.eos_token_id)
    prompts = prompt_set(config, tokenizer)
    model_folder = write_initial_model(
        config.model, len(tokenizer), eos, config.seed, str(initial_folder)
    )
    if config.teacher is not None:
        require_same_vocabulary(config.teacher.path, model_folder)
    stop_ids = stop_token_ids(tokenizer, model_folder)
    texts = external_draft_texts(config, tokenizer)
    return Preparation(tokenizer, model_folder, stop_ids, prompts, texts)


def external_draft_texts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[DraftText, ...]:
    """Return the completions of files that engines are to draft from at the start.

    Raises:
        DataError: a file is missing, or a line of it holds no completion.
    """
    drafting = config.rollout.drafting
    if drafting is None:
        return ()
    reader = DraftFileReader(
        functools.partial(encode, tokenizer, special_tokens=not config.data.source.chat),
        functools.partial(encode, tokenizer, special_tokens=False),
        int(tokenizer.eos_token_id),
        len(tokenizer),
    )
    paths = (Path(path).expanduser() for path in drafting.corpus)
    return tuple(text for path in paths for text in reader.read(path))


def require_loadable(config: RunConfig, learner_folder: Path, initial_folder: Path) -> None:
    """Refuse a checkpoint that the learner would refuse, before anything is started or written.

    ``learner_folder`` is the learner's part of it. Where the run's initial model was removed, only
    that it is whole is looked at: the model will be written anew.

    Raises:
        UserError: it is incomplete or of another model, or the model cannot be read.
    """
    critic = critic_of(config.algorithm)
    is_shared = critic is not None and critic.backbone == "shared"
    roles = {"policy": is_shared} | ({"critic": True} if critic and not is_shared else {})
    if config.model.path is None and not initial_folder.exists():
        roles = {}
    folder = config.model.path or str(initial_folder)
    state = {
        role: {"model": dict(empty_policy(folder, has_values=has_values).trained_parameters())}
        for role, has_values in roles.items()
    }
    checkpoint.require_loadable(str(learner_folder), state)


@contextlib.asynccontextmanager
async def started_parts(config: RunConfig, prepared: Preparation) -> AsyncIterator[Parts]:
    """Start grader, learner and rollout workers side by side; stop them at the end.

    Raises:
        UserError: one of them cannot work as configured.
    """
    async with contextlib.AsyncExitStack() as stack:
        weights_folder = stack.enter_context(shared_folder())
        grader = grader_pool(config)
        stack.callback(grader.close)
        publisher = draft_publisher(config, prepared.draft_texts)
        _, learner, pool, teacher = await gather_or_cancel(
            grader.start(),
            start_learner(config, prepared.model_folder, weights_folder, stack),
            start_pool(config, prepared.model_folder, publisher, stack),
            start_teacher(config, stack),
        )
        yield Parts(config, prepared, grader, learner, pool, teacher, publisher)


def draft_publisher(config: RunConfig, texts: Sequence[DraftText]) -> DraftPublisher | None:
    """Return the publisher of draft text, with ``texts`` in its corpus; None without drafting."""
    drafting = config.rollout.drafting
    if drafting is None:
        return None
    max_tokens = (drafting.max_memory_mb << 20) // DRAFTER_BYTES_PER_TOKEN
    publisher = DraftPublisher(DraftCorpus(drafting.window, max_tokens), put_block, max_tokens)
    publisher.preload(texts)
    return publisher


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


def with_draft_budget(config: RunConfig) -> RolloutConfig:
    """The engines' settings; what drafts are to shorten is a matter of how the run is paced.

    Where training waits for its batch, that is the batch's makespan. Where it runs behind, what
    ends is followed by other prompts, and every token that comes sooner is trained sooner.
    """
    drafting = config.rollout.drafting
    if drafting is None or drafting.budget is not None:
        return config.rollout
    budget = "throughput" if config.loop.max_lag else "makespan"
    drafting = drafting.model_copy(update={"budget": budget})
    return config.rollout.model_copy(update={"drafting": drafting})


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
    actor: type[RolloutActor],
    stack: contextlib.AsyncExitStack,
    publisher: DraftPublisher | None = None,
) -> WorkerPool:
    """Start workers with an engine each, and see to their end."""
    max_samples = most_samples(rollout.max_num_seqs)

    async def start(index: int) -> RolloutActor:
        return await start_rollout_worker(
            index,
            functools.partial(ROLLOUT_WORKER, engine),
            cpus=rollout.cpus_per_worker,
            gpus=rollout.gpus_per_worker,
            environment=engine_environment(on_gpu=rollout.gpus_per_worker > 0),
            max_requests=max_samples,
            actor_class=actor,
        )

    workers = await gather_or_cancel(*(start(index) for index in range(rollout.num_workers)))
    pool = WorkerPool(
        workers,
        start,
        max_restarts=rollout.max_restarts,
        max_samples=max_samples,
        limits=TimeLimits(rollout.claim_seconds, rollout.answer_seconds),
        section=actor.section,
        draft_publisher=publisher,
    )
    stack.push_async_callback(pool.close)
    return pool
