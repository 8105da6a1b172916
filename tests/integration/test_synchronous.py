"""``max_lag: 0`` is synchronous training: the loop against one written by hand, weight by weight.

Both use the real vLLM engine and the real learner, each pair of its own, in this process. The hand
loop knows no buffer, no tasks and no ledger: it samples, grades, scores, trains and updates, one
thing after the other.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch

from paceline.configs.schema.learner import LearnerConfig, OptimizerConfig
from paceline.configs.vocabulary import (
    Completion,
    Group,
    Prompt,
    RolloutRequest,
    Sample,
    SamplingParameters,
    StepReport,
    TrainBatch,
    WeightVersion,
)
from paceline.controller.groups.assembly import Collector, SignalFilter
from paceline.controller.groups.buffer import WorkBuffer
from paceline.controller.groups.freshness import freshness_budget
from paceline.controller.groups.generation import Rollouts, request_seed
from paceline.controller.groups.pacing import Pacer
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from paceline.controller.loop import Loop
from paceline.learner.model.model import write_initial_model
from paceline.learner.objective.advantages import GroupRelative, Outcome
from paceline.learner.objective.losses.policy import Clip
from paceline.learner.objective.objective import Objective
from paceline.learner.worker import LearnerWorker
from paceline.rollout.worker import RolloutWorker
from tests.rollout.conftest import STOP, build_engine, tiny_model_config

STEPS, GROUPS, SAMPLES, SEED, VOCABULARY = 5, 4, 4, 11, 128
SAMPLING = SamplingParameters(max_tokens=12, stop_token_ids=(STOP,))
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
ALGORITHM = Objective(GroupRelative(), Clip(0.2, 0.28), "token_mean", SAMPLING.max_tokens)
GIVEN_ADVANTAGES = Objective(Outcome(), Clip(0.2, 0.28), "token_mean", SAMPLING.max_tokens)
"""For the loop by hand, which finds the advantages itself and hands them in as rewards."""


def prompt_at(position: int) -> Prompt:
    generator = np.random.default_rng(position)
    token_ids = tuple(int(t) for t in generator.integers(2, VOCABULARY, 3 + position % 5))
    return Prompt(f"p{position}", "", token_ids)


def reward_of(token_ids) -> float:
    """Some groups agree about it and are replaced, most do not."""
    return float(np.asarray(token_ids)[0] % 4 == 0)


class Pair:
    """A learner and an engine that agree on version 0."""

    def __init__(self, root) -> None:
        config = tiny_model_config()
        folder = str(root / "model")
        write_initial_model(config, VOCABULARY, STOP, seed=0, folder=folder)
        (root / "weights").mkdir()
        self.learner = LearnerWorker(
            folder,
            config,
            LearnerConfig(tokens_per_microbatch=256),
            rank=0,
            rendezvous=None,
            weights_folder=str(root / "weights"),
            seed=0,
        )
        self.worker = RolloutWorker(lambda: build_engine(folder))

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            name: p.detach().clone()
            for part in self.learner._models.policy.parts
            for name, p in part.named_parameters()
        }

    # what the loop asks of its parts

    async def forward_backward(self, batch, algorithm):
        return Update(self.learner, batch.step, self.learner.forward_backward(batch, algorithm))

    async def publish(self, version):
        return self.learner.publish(version)

    async def push(self, handle):
        assert await self.worker.update_weights(handle) == (handle.version, handle.checksum)


@dataclass
class Update:
    """Gradients that the learner holds."""

    learner: LearnerWorker
    step: int
    report: StepReport

    async def apply(self):
        self.learner.optimizer_step(OPTIMIZER, self.step, STEPS)
        return replace(self.report, version=WeightVersion(self.step + 1))


async def grade(prompt, texts):
    return [reward_of(text) for text in texts]


async def train_with_the_loop(pair: Pair) -> list[tuple[int, ...]]:
    budget = freshness_budget(GROUPS, max_lag=0)
    journal = Journal(MemoryStore())
    buffer = WorkBuffer(budget, journal)
    trained = []

    async def after_step(step):
        trained.append(step.batch.batch.group_ids)
        assert step.batch.max_age == 0
        return False

    pair.after_step = after_step
    await pair.push(pair.learner.publish(0))
    await Loop(
        prompts=((position, prompt_at(position)) for position in itertools.count()),
        generate=Rollouts(
            sample=pair.worker.generate,
            grade=grade,
            decode=lambda token_ids: token_ids,
            sampling=SAMPLING,
            num_samples=SAMPLES,
            seed=SEED,
            require_finish=False,
        ),
        collector=Collector(buffer, journal, SignalFilter(), GROUPS),
        algorithm=ALGORITHM,
        learner=pair,
        weights=pair,
        observer=pair,
        budget=budget,
        buffer=buffer,
        journal=journal,
        pace=Pacer(budget),
        num_steps=STEPS,
    ).run()
    return trained


async def train_by_hand(pair: Pair) -> list[tuple[int, ...]]:
    positions = itertools.count()
    trained = []
    handle = pair.learner.publish(0)
    for step in range(STEPS):
        await pair.worker.update_weights(handle)
        groups = []
        while len(groups) < GROUPS:
            position = next(positions)
            completions = await sampled_by_hand(pair, position)
            rewards = np.array([reward_of(each.token_ids) for each in completions])
            if rewards.min() == rewards.max():
                continue
            advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
            samples = tuple(map(Sample, completions, advantages))
            groups.append(Group(position, prompt_at(position), samples))
        batch = TrainBatch(step, tuple(groups))
        pair.learner.forward_backward(batch, GIVEN_ADVANTAGES)
        pair.learner.optimizer_step(OPTIMIZER, step, STEPS)
        handle = pair.learner.publish(step + 1)
        trained.append(batch.group_ids)
    return trained


async def sampled_by_hand(pair: Pair, position: int) -> tuple[Completion, ...]:
    prompt = prompt_at(position)
    seed = request_seed(SEED, 0, position)
    request = RolloutRequest(f"{position}", prompt.token_ids, SAMPLING, SAMPLES, seed)
    return await pair.worker.generate(request)


def test_without_lag_the_loop_makes_the_weights_of_a_synchronous_loop_written_by_hand(tmp_path):
    outcomes = []
    for name, train in (("loop", train_with_the_loop), ("hand", train_by_hand)):
        (tmp_path / name).mkdir()
        pair = Pair(tmp_path / name)
        before = pair.weights()
        outcomes.append((asyncio.run(train(pair)), pair.weights()))
        asyncio.run(pair.worker.close())
    (order, mine), (hand_order, hand) = outcomes
    assert order == hand_order
    assert max(group for step in order for group in step) >= STEPS * GROUPS, "none was replaced"
    for name in hand:
        torch.testing.assert_close(mine[name], hand[name], rtol=0, atol=1e-6)
        assert (hand[name] - before[name]).abs().max() > 1e-3, f"{name} was hardly trained"
