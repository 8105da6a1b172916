"""``max_lag: 0`` is synchronous training: the loop against one written by hand, weight by weight.

Both use the real vLLM engine and the real learner, each pair of its own, in this process. The hand
loop knows no buffer, no tasks and no ledger: it samples, grades, scores, trains and updates, one
thing after the other. What the loop made of a policy is looked at, too.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from paceline.configs.load import load_config
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
from paceline.controller.wiring.algorithms import build_algorithm
from paceline.learner.model.model import write_initial_model
from paceline.learner.objective.advantages import Outcome
from paceline.learner.worker import LearnerWorker
from paceline.rollout.worker import RolloutWorker
from tests.rollout.conftest import STOP, build_engine, tiny_model_config

STEPS, GROUPS, SAMPLES, SEED, VOCABULARY = 12, 4, 4, 11, 128
MAX_TOKENS = 12
SAMPLING = SamplingParameters(max_tokens=MAX_TOKENS, stop_token_ids=(STOP,))
OPTIMIZER = OptimizerConfig(learning_rate=3e-2, warmup_steps=1)
_, ALGORITHM = build_algorithm(load_config("debug", (f"rollout.sampling.max_tokens={MAX_TOKENS}",)))
"""GRPO as it is configured."""
GIVEN_ADVANTAGES = replace(ALGORITHM, advantage=Outcome())
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


def expected_reward(learner: LearnerWorker) -> float:
    """The mean reward of what the learner's policy samples, computed rather than sampled."""
    rewarded = [token for token in range(VOCABULARY) if reward_of([token])]
    completions = [
        Completion(np.array([token], np.int32), np.zeros(1, np.float32), (), "stop")
        for token in rewarded
    ]
    samples = tuple(Sample(completion, 1.0) for completion in completions)
    prompts = range(STEPS * GROUPS)
    logprobs = learner.logprobs([Group(i, prompt_at(i), samples) for i in prompts])
    return float(np.exp(np.concatenate(logprobs)).sum()) / len(prompts)


@dataclass
class Trained:
    """What a loop made of a fresh pair."""

    order: list[tuple[int, ...]]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    rewards: tuple[float, float]


def trained_by(train, root) -> Trained:
    pair = Pair(root)
    before, reward = pair.weights(), expected_reward(pair.learner)
    order = asyncio.run(train(pair))
    asyncio.run(pair.worker.close())
    return Trained(order, before, pair.weights(), (reward, expected_reward(pair.learner)))


@pytest.fixture(scope="module")
def by_the_loop(tmp_path_factory) -> Trained:
    return trained_by(train_with_the_loop, tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory) -> Trained:
    return trained_by(train_by_hand, tmp_path_factory.mktemp("hand"))


def test_a_run_makes_what_is_rewarded_likelier(by_the_loop):
    """Wrong in the sign of the loss or of the advantages, it would make it rarer."""
    before, after = by_the_loop.rewards
    assert before == pytest.approx(0.25, abs=0.02), "a new model knows nothing"
    assert after > 0.5


def test_without_lag_the_loop_makes_the_weights_of_a_synchronous_loop_written_by_hand(
    by_the_loop, by_hand
):
    assert by_the_loop.order == by_hand.order
    last = max(group for step in by_the_loop.order for group in step)
    assert last >= STEPS * GROUPS, "none was replaced"
    for name, weights in by_hand.after.items():
        torch.testing.assert_close(by_the_loop.after[name], weights, rtol=0, atol=1e-6)
        moved = (weights - by_hand.before[name]).abs().max()
        assert moved > 1e-3, f"{name} was hardly trained"
