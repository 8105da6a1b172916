"""Our objectives beside whole steps of TRL's trainers: same rewards in, same gradient out.

Everything between rewards and gradient is TRL's here, in float64: advantages, corrections,
penalties, bonus, pairs. PPO, which TRL no longer has, is compared with `reference_losses.py`, and
its advantages with RLlib's (`test_against_rllib.py`).

Where implementations disagree, and what we follow:

- GRPO's paper does not say whether its standard deviation is of the sample; TRL, verl and we divide
  by n - 1.
- TRL's ``epsilon_high`` of CISPO is the bound itself, as our ``high``; the paper's is what it
  exceeds 1 by. Neither bounds from below.
- DAPO and CISPO divide by the tokens of the whole update in TRL, verl and here, by those of a group
  in DAPO's paper.
- RLOO: TRL clips the ratio of the whole sample, verl that of each token, the paper has none. The
  preset is verl's, which old samples survive; TRL's is compared here.

Settings that make the two the same, and would not by default:

- TRL adds 1e-4 to a group's standard deviation, ours 1e-6.
- TRL's entropy bonus is a mean over all tokens whatever the loss averages; ours is averaged like
  the loss, so they agree where it is over tokens.
- TRL's ratio is to the learner's policy at the start of the step, and what the engine disagrees by
  is a correction: ``old_policy: recomputed``.
- TRL clips RLOO's ratio of whole samples, a product.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.schema.algorithm import PolicyAlgorithm
from paceline.controller.wiring.algorithms import policy_optimization, preferences
from paceline.learner.objective.advantages import GroupRelative
from paceline.learner.objective.losses.inputs import LossInputs, Sequences
from paceline.learner.objective.losses.value import value_loss
from tests.learner.batch.token_tables import nothing, tokens_of
from tests.learner.peers import reference_losses
from tests.learner.peers.trl_steps import Samples, dpo_loss, grpo_step, rloo_step

MAX_TOKENS = 12
SEEDS = st.integers(0, 10_000)


def sampled(seed, group_size=4, groups=3, moved=0.3):
    """Groups of random samples; policies differ from another by ``moved`` nats a token."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, MAX_TOKENS + 1, groups * group_size)
    # what the wire carries is float32
    behaviour = generator.normal(-2, 1, lengths.sum()).astype(np.float32).astype(np.float64)

    def other():
        away = behaviour + generator.normal(0, moved, len(behaviour))
        return torch.from_numpy(away.astype(np.float32).astype(np.float64))

    return Samples(
        lengths=torch.from_numpy(lengths),
        rewards=torch.from_numpy(generator.normal(size=len(lengths))),
        group_size=group_size,
        logprobs=other().requires_grad_(),
        behaviour_logprobs=torch.from_numpy(behaviour),
        proximal_logprobs=other(),
        reference_logprobs=other(),
        entropy=torch.from_numpy(generator.uniform(0, 2, len(behaviour))).requires_grad_(),
    )


def objective_of(**settings):
    """A preset with parts laid over it, and TRL's epsilon where advantages are divided."""
    objective = policy_optimization(PolicyAlgorithm.model_validate(settings), MAX_TOKENS)
    if isinstance(objective.advantage, GroupRelative):
        return replace(objective, advantage=replace(objective.advantage, epsilon=1e-4))
    return objective


def our_tokens(samples, **columns):
    return tokens_of(
        samples.rewards.numpy(),
        np.arange(len(samples.lengths)) // samples.group_size,
        samples.lengths.tolist(),
        samples.behaviour_logprobs.numpy(),
        proximal_logprobs=samples.proximal_logprobs.numpy(),
        reference_logprobs=samples.reference_logprobs.numpy(),
        **columns,
    )


def our_loss(objective, samples, **columns):
    """From rewards to the loss, as the learner does it."""
    prepared = objective.prepare(our_tokens(samples, **columns)).columns
    inputs = LossInputs(
        logprobs=samples.logprobs,
        entropy=samples.entropy,
        sequences=Sequences.of_lengths(samples.lengths),
        **{name: torch.from_numpy(column).double() for name, column in prepared.items()},
    )
    return objective.loss(inputs).loss


def assert_same_gradient(ours, theirs, inputs):
    found = torch.autograd.grad(ours, inputs, allow_unused=True)
    expected = torch.autograd.grad(theirs, inputs, allow_unused=True)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-5)
    assert any(other.abs().max() > 1e-3 for other in expected)


def assert_same(ours, theirs, *inputs):
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert_same_gradient(ours, theirs, inputs)


PAIRS = {
    "grpo": ("grpo", {}, {}),
    "dr_grpo": ("dr_grpo", {"scale_rewards": "none"}, {}),
    "dapo": ("dapo", {"epsilon_high": 0.28}, {}),
    "gspo": (
        "grpo",
        {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.1},
        {"loss": {"clip_low": 0.05, "clip_high": 0.1}},
    ),
    "cispo": ("cispo", {"epsilon_high": 1.28}, {}),
}


@pytest.mark.parametrize("name", PAIRS)
@given(seed=SEEDS)
def test_steps_from_rewards_to_gradient_are_trls(name, seed):
    loss_type, settings, parts = PAIRS[name]
    samples = sampled(seed)
    ours = our_loss(objective_of(type=name, old_policy="recomputed", **parts), samples)
    theirs = grpo_step(samples, loss_type, MAX_TOKENS, **settings).loss
    assert_same(ours, theirs, samples.logprobs)


CORRECTIONS = {
    "token_truncate": ({"type": "truncate", "cap": 1.2}, {"clip_max": 1.2}),
    "token_mask": ({"type": "mask_above", "cap": 1.2}, {"clip_max": 1.2}),
    "sequence_truncate": (
        {"type": "truncate", "cap": 1.2, "level": "sequence"},
        {"clip_max": 1.2},
    ),
    "sequence_mask": (
        {"type": "mask_above", "cap": 1.2, "level": "sequence"},
        {"clip_max": 1.2},
    ),
    "token_mask on both sides": (
        {"type": "mask_outside", "low": 0.8, "high": 1.2},
        {"clip_min": 0.8, "clip_max": 1.2},
    ),
}


@pytest.mark.parametrize("name", CORRECTIONS)
@given(seed=SEEDS)
def test_corrections_are_trls(name, seed):
    """TIS, MIS and IcePop, with a penalty in the loss that none of them touches."""
    correction, bounds = CORRECTIONS[name]
    samples = sampled(seed)
    objective = objective_of(
        type="dapo",
        old_policy="recomputed",
        corrections=(correction,),
        reference={"coefficient": 0.05},
    )
    settings = {f"vllm_importance_sampling_{name}": bound for name, bound in bounds.items()}
    theirs = grpo_step(
        samples,
        "dapo",
        MAX_TOKENS,
        epsilon_high=0.28,
        beta=0.05,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=name.split()[0],
        **settings,
    ).loss
    assert_same(our_loss(objective, samples), theirs, samples.logprobs)


@given(seed=SEEDS)
def test_the_dual_clip_and_the_entropy_bonus_are_trls(seed):
    """Its bonus is of all tokens alike whatever the loss averages, as ours is by `token_mean`."""
    samples = sampled(seed)
    objective = objective_of(
        type="dapo",
        old_policy="recomputed",
        loss={"type": "clip", "clip_high": 0.28, "dual_clip": 1.4},
        entropy_coefficient=0.03,
    )
    theirs = grpo_step(
        samples, "dapo", MAX_TOKENS, epsilon_high=0.28, delta=1.4, entropy_coef=0.03
    ).loss
    assert_same(our_loss(objective, samples), theirs, samples.logprobs, samples.entropy)


@given(seed=SEEDS)
def test_a_step_of_rloo_with_its_penalty_in_the_reward_is_trls(seed):
    samples = sampled(seed, moved=0.05)
    samples = replace(samples, proximal_logprobs=samples.behaviour_logprobs)
    sequence_clip = {"type": "sequence_clip", "clip_low": 0.2, "clip_high": 0.2}
    objective = objective_of(
        type="rloo",
        loss=sequence_clip | {"length_normalized": False},
        aggregation="sequence_mean",
        reference={"coefficient": 0.05, "estimator": "k1", "place": "reward"},
    )
    theirs = rloo_step(samples, beta=0.05).loss
    assert_same(our_loss(objective, samples), theirs, samples.logprobs)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@given(seed=SEEDS)
def test_dpo_is_trls(beta, seed):
    samples = sampled(seed, group_size=2)
    # the weights of the step are those that are trained
    samples = replace(samples, proximal_logprobs=samples.logprobs.detach())
    objective = preferences(beta, MAX_TOKENS)
    theirs = dpo_loss(samples, beta)
    value = objective.prepare(our_tokens(samples)).metrics["preference_loss"]
    assert value == pytest.approx(theirs.item(), rel=1e-6)
    assert_same_gradient(our_loss(objective, samples), theirs, (samples.logprobs,))


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@given(seed=SEEDS)
def test_ppo_is_its_papers(dual_clip, seed):
    """From rewards and values to the policy's gradient: GAE, whitening, clipping."""
    samples = sampled(seed)
    values = np.random.default_rng(seed).normal(size=len(samples.logprobs)).astype(np.float32)
    objective = objective_of(
        type="ppo",
        advantage={"discount": 0.99, "trace_decay": 0.9},
        loss={"dual_clip": dual_clip},
    )
    found, starts = [], np.cumsum([0, *samples.lengths.tolist()])
    for sample, reward in enumerate(samples.rewards.tolist()):
        of_sample = values[starts[sample] : starts[sample + 1]].tolist()
        rewards = [0.0] * (len(of_sample) - 1) + [reward]
        found += reference_losses.advantages(rewards, of_sample, 0.99, 0.9)
    theirs = reference_losses.policy_loss(
        samples.logprobs,
        samples.behaviour_logprobs.tolist(),
        reference_losses.whitened(found),
        0.2,
        dual_clip,
    )
    assert_same(our_loss(objective, samples, values=values), theirs, samples.logprobs)
    returns = objective.advantage(
        our_tokens(samples, values=values), nothing(our_tokens(samples))
    ).returns
    np.testing.assert_allclose(returns, np.array(found) + values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 0.2])
@given(seed=SEEDS)
def test_the_critics_loss_is_that_of_ppos_code(clip, seed):
    generator = np.random.default_rng(seed)
    values, old, returns = torch.from_numpy(generator.normal(size=(3, 50)))
    values.requires_grad_()
    ours = value_loss(values, old, returns, clip).mean()
    theirs = reference_losses.value_loss(values, old.tolist(), returns.tolist(), clip)
    assert_same(ours, theirs, values)
