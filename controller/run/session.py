"""One run from start to summary: warm start, evaluation, training, evaluation, export."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from paceline.configs.errors import CheckpointError, RunInterrupted, UserError
from paceline.configs.schema import RunConfig
from paceline.configs.schema.algorithm import WarmStartConfig, reference_of
from paceline.configs.schema.learner import OptimizerConfig
from paceline.configs.vocabulary import Group
from paceline.controller.drafts.drift import DriftWindow, PolicyDrift
from paceline.controller.groups.assembly import Collector
from paceline.controller.groups.buffer import WorkBuffer
from paceline.controller.groups.freshness import FreshnessBudget, freshness_budget
from paceline.controller.groups.pacing import Pacer, Unpaced
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from paceline.controller.loop import Loop
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.recorder import Recorder
from paceline.controller.parts import StepView
from paceline.controller.ranks.learner_ranks import LearnerPhase
from paceline.controller.run.checkpoints import (
    DRAFT_CORPUS,
    LEARNER,
    CheckpointFolder,
    RunState,
    Save,
)
from paceline.controller.run.evaluations import RunEvaluations
from paceline.controller.run.incidents import CautiousLearner
from paceline.controller.run.metering import StepMeter
from paceline.controller.run.phases import (
    MetricsHook,
    StepHook,
    TrainingObserver,
    WarmStartObserver,
)
from paceline.controller.run.progress import RunProgress
from paceline.controller.run.recovery import Recovered, recover, require_empty
from paceline.controller.wiring import algorithms
from paceline.controller.wiring.processes import max_claims
from paceline.controller.wiring.services import NoEngines, Services


@dataclass(frozen=True)
class Resumption:
    """A checkpoint to continue from, and whether groups sampled before fit today's settings."""

    state: RunState
    folder: Path
    groups_fit: bool


BYTES_PER_TOKEN = 9
"""Of a sample: int32 id, float32 log-probability and the loss mask."""
TEACHER_BYTES = 4
"""Of a sample a teacher looked at: its float32 log-probability."""
SOLVED_REWARD = 0.99
"""Mean reward from which a run without learning signal counts as solved rather than stuck."""


class Session:
    """A run with its services started. ``stop`` may be set at any time to end it after the step."""

    def __init__(
        self,
        services: Services,
        folder: RunFolder,
        recorder: Recorder,
        progress: RunProgress,
        journal: Journal,
        stop: asyncio.Event,
    ) -> None:
        self._services = services
        self._config: RunConfig = services.config
        self._folder = folder
        self._recorder = recorder
        self._progress = progress
        self._journal = journal
        self._stop = stop
        self._started = progress.began
        self._feed = services.inputs.prompts.feed()
        self._checkpoints = CheckpointFolder(folder.checkpoints, self._config.checkpoint.keep)
        self._evaluations = RunEvaluations(
            services.evaluator(),
            services.inputs.prompts.held_out,
            self._config.evaluation.num_examples,
            folder,
            recorder,
            progress,
        )
        drafting = self._config.rollout.drafting
        max_drift = None if drafting is None else drafting.max_drift
        self._drift = None if max_drift is None else PolicyDrift(max_drift)
        loop = self._config.loop
        self._budget = freshness_budget(loop.groups_per_step, loop.max_lag, loop.window_fraction)
        token_bytes = BYTES_PER_TOKEN + TEACHER_BYTES * (self._config.teacher is not None)
        group_bytes = loop.samples_per_group * self._config.model.max_length * token_bytes
        self._buffer = WorkBuffer(self._budget, journal, loop.buffer_mb << 20, group_bytes)

    async def run(self, resume_from: Resumption | None) -> None:
        """Do everything between started services and a finished run.

        Raises:
            RunInterrupted: a stop was asked for; the run was saved as far as it got.
        """
        if resume_from is None:
            phase, recovered = await self._begin(), Recovered()
        else:
            phase, recovered = await self._restore(resume_from)
        if self._services.draft_publisher is not None:
            await self._services.draft_publisher.settled()
        with self._progress.spending("train"):
            await self._train(phase, recovered)
        await self._evaluations.after(self._progress.step)
        self._raise_if_stopped()
        self._recorder.message("writing the final model")
        await self._services.learner.export(str(self._folder.final))
        self._services.inputs.tokenizer.save_pretrained(str(self._folder.final))

    async def _begin(self) -> LearnerPhase:
        """Make the model that training begins with, evaluate it, and begin its training."""
        require_empty(self._journal, self._config.name)
        if self._config.warm_start is not None:
            with self._progress.spending("warm_start"):
                await self._warm_start(self._config.warm_start)
        phase = await self._begin_training()
        await self._serve(0)
        await self._evaluations.before()
        self._raise_if_stopped()
        if self._config.checkpoint.every_steps is not None:
            await self._save(0)
        return phase

    async def _warm_start(self, config: WarmStartConfig) -> None:
        """Take supervised steps of the same loop, until validation is good enough."""
        began = time.perf_counter()
        self._recorder.message(
            f"warm start: supervised until greedy accuracy reaches {config.target_accuracy:.0%}"
        )
        optimizer = OptimizerConfig(
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            final_fraction=0.0,
        )
        phase = await self._services.learner.begin(optimizer, config.max_steps)
        signal, algorithm = algorithms.imitation()
        budget = FreshnessBudget(2 * config.batch_size, 1, config.batch_size)
        journal = Journal(MemoryStore())
        buffer = WorkBuffer(budget, journal)
        observer = WarmStartObserver(
            recorder=self._recorder,
            meter=StepMeter("warm_start", self._started),
            validate=self._validate,
            evaluate_every=config.evaluate_every,
            target_accuracy=config.target_accuracy,
        )
        loop = Loop(
            prompts=self._feed,
            generate=self._services.demonstrations(),
            collector=Collector(buffer, journal, signal, config.batch_size),
            algorithm=algorithm,
            learner=phase,
            weights=NoEngines(),
            observer=observer,
            budget=budget,
            buffer=buffer,
            journal=journal,
            pace=Unpaced(budget),
            num_steps=config.max_steps,
            stop=self._stop,
        )
        await loop.run()
        self._raise_if_stopped()
        self._feed.skip_to(observer.next_position)
        seconds = time.perf_counter() - began
        self._progress.warm_start = {"steps": loop.steps_done, "seconds": seconds}
        if observer.reached < config.target_accuracy:
            raise UserError(
                f"the warm start reached greedy accuracy {observer.reached:.2f} after "
                f"{config.max_steps} steps, expected warm_start.target_accuracy "
                f"{config.target_accuracy}: raise warm_start.max_steps or lower the target"
            )

    async def _train(self, phase: LearnerPhase, recovered: Recovered) -> None:
        """Run reinforcement learning: the loop with everything in its place."""
        config, services, progress = self._config, self._services, self._progress
        if progress.step >= config.loop.num_steps:
            self._recorder.message(
                f"all {config.loop.num_steps} steps were done before: nothing is trained; raise "
                "loop.num_steps to go on"
            )
            return
        loop_config = config.loop
        self._buffer.restore(recovered.works, recovered.slots)
        signal, algorithm = algorithms.build_algorithm(config)
        temperature = algorithms.training_temperature(config)
        observer = TrainingObserver(
            recorder=self._recorder,
            meter=StepMeter("train", self._started),
            totals=progress.totals,
            pool=services.pool,
            journal=self._journal,
            samples_per_step=config.observability.samples_per_step,
            metrics=self._step_metrics(),
            hooks=(
                StepHook(self._self_check, first=config.observability.self_check_steps),
                StepHook(self._evaluations.during, every=config.evaluation.every_steps),
                StepHook(self._save, every=config.checkpoint.every_steps),
            ),
        )
        loop = Loop(
            prompts=self._feed,
            generate=services.training_groups(),
            collector=Collector(
                self._buffer,
                self._journal,
                signal,
                loop_config.groups_per_step,
                temperature,
                recovered.batches,
            ),
            algorithm=algorithm,
            learner=CautiousLearner(phase, services.learner.save, self._folder.incidents),
            weights=services.weights,
            observer=observer,
            budget=self._budget,
            buffer=self._buffer,
            journal=self._journal,
            pace=Pacer(self._budget) if loop_config.pacing else Unpaced(self._budget),
            max_claims=max_claims(config),
            num_steps=loop_config.num_steps,
            first_step=progress.step,
            stop=self._stop,
        )
        self._recorder.message(
            f"training: {loop_config.num_steps - progress.step} steps, "
            f"policy age at most {self._budget.max_age}"
        )
        observer.meter.restart(await services.pool.counters())
        try:
            await loop.run()
        except Exception:
            with suppress(Exception):  # the run's own error is the one to tell
                await self._checkpoints.finish()
            raise
        finally:
            progress.step = loop.first_step + loop.steps_done
        await self._save(progress.step)
        await self._checkpoints.finish()
        self._raise_if_stopped()
        if loop.exhausted is not None:
            if loop.exhausted.mean_reward < SOLVED_REWARD:
                raise loop.exhausted
            progress.solved = True

    def _step_metrics(self) -> tuple[MetricsHook, ...]:
        """Return hooks that see how each step's groups went, and how far it took the policy."""

        def outcomes(step: StepView) -> Mapping[str, float]:
            return self._feed.observe(step.batch.outcomes)

        if self._drift is None:
            return (outcomes,)
        publisher = self._services.draft_publisher
        assert publisher is not None, "the schema has max_drift where engines draft"
        window = DriftWindow(self._drift, publisher.drop_before)
        return (outcomes, lambda step: window.observe(step.batch, step.report))

    async def _restore(self, resumption: Resumption) -> tuple[LearnerPhase, Recovered]:
        """Continue from a checkpoint, with what the ledger knows of the time since."""
        state = resumption.state
        self._recorder.message(f"resuming after step {state.step}")
        if self._drift is not None:
            self._drift.resume(state.step, state.drift)
        self._feed.restore(state.feed)
        recovered = await recover(self._journal, state, self._feed.at, fits=resumption.groups_fit)
        self._feed.skip_to(recovered.next_position)
        self._recorder.message(f"recovered {recovered}")
        phase = await self._begin_training()
        await self._services.learner.load(str(resumption.folder / LEARNER))
        await self._restore_drafting(resumption.folder / DRAFT_CORPUS, recovered.groups)
        await self._serve(state.step)
        return phase, recovered

    async def _restore_drafting(self, path: Path, groups: Iterable[Group]) -> None:
        """Have engines draft from what they knew; without it they only begin slower."""
        publisher = self._services.draft_publisher
        if publisher is None:
            return
        try:
            await self._services.load_draft_corpus(path)
        except CheckpointError as error:
            self._recorder.message(f"drafting starts cold: {error}")
        publisher.preload_groups(groups)
        if self._drift is not None and (oldest := self._drift.oldest_near()) > 0:
            publisher.drop_before(oldest)

    async def _begin_training(self) -> LearnerPhase:
        """Begin with a fresh optimiser and, where the algorithm has one, the reference policy.

        The policy as it is now, unless the reference is configured, becomes the reference; it is
        kept in the run's folder, where a resumed run finds it.
        """
        optimizer, num_steps = self._config.learner.optimizer, self._config.loop.num_steps
        phase = await self._services.learner.begin(optimizer, num_steps)
        reference = reference_of(self._config.algorithm)
        if reference is None:
            return phase
        folder = reference.path or str(self._folder.reference)
        if reference.path is None and not self._folder.reference.exists():
            await self._services.learner.export(folder)
        await self._services.learner.load_reference(folder, reference.offload)
        return phase

    async def _serve(self, version: int) -> None:
        """Bring the learner's weights to every engine as ``version``."""
        await self._services.weights.push(await self._services.weights.publish(version))

    async def _save(self, step: int) -> None:
        """Begin a checkpoint; called with every trained group's slot released."""
        self._progress.settle()
        await self._journal.flush()
        state = RunState(
            step=step,
            feed=self._feed.state(),
            pending=self._buffer.unreleased(),
            totals=self._progress.totals.as_dict(),
            seconds=dict(self._progress.seconds),
            warm_start=self._progress.warm_start,
            before=self._progress.before,
            drift=() if self._drift is None else tuple(self._drift.distances),
        )
        parts: dict[str, Save] = {LEARNER: self._services.learner.save}
        if self._services.draft_publisher is not None:
            parts[DRAFT_CORPUS] = self._services.save_draft_corpus
        await self._checkpoints.save(state, parts, self._journal.settle)

    async def _validate(self, step: int) -> float:
        """Return the greedy accuracy on validation prompts, with the weights of now."""
        await self._serve(step)
        prompts = self._services.inputs.prompts.validation
        return await self._evaluations.validate(prompts, step)

    async def _self_check(self, step: int) -> None:
        checked = await self._services.self_check(f"version {step}")
        self._recorder.message(
            f"self-check of version {step}: {checked} greedy tokens equal the learner's"
        )

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise RunInterrupted
