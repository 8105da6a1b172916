"""Our objectives beside independent public code: TRL's trainers and RLlib's advantages.

Values and gradients agree to 1e-5 or better. Where implementations disagree:

- GRPO's standard deviation: the paper does not say whether of the sample; TRL, verl and we divide
  by n - 1. TRL adds 1e-4 to it, verl and we 1e-6.
- CISPO: TRL's ``epsilon_high`` is the bound itself, the paper's is what it exceeds 1 by; our
  ``high`` is the bound. Neither bounds from below.
- DAPO and CISPO divide by the tokens of the whole update in TRL, verl and here, by those of a group
  in DAPO's paper.
- RLOO: TRL clips the ratio of the whole sample, verl that of each token, the paper has none. The
  preset is verl's, which old samples survive; TRL's is compared here as well.
- TRL has no PPO any more: its clipped loss is TRL's for given advantages, GAE is RLlib's.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.load import load_config
from paceline.configs.schema.algorithm import PolicyAlgorithm
from paceline.controller.algorithms import policy_optimization
from paceline.learner.advantages import GeneralizedAdvantage, GroupRelative, LeaveOneOut
from paceline.learner.losses.inputs import LossInputs, Sequences
from tests.learner import trl_losses
from tests.learner.token_tables import nothing, tokens_of

MAX_TOKENS = 12
GROUPS, SAMPLES = 3, 4


def padded_batch(seed, moved=0.3):
    """Samples [n, C] in float64: log-probabilities, old ones, rewards, mask."""
    generator = np.random.default_rng(seed)
    count = GROUPS * SAMPLES
    lengths = generator.integers(1, MAX_TOKENS + 1, count)
    mask = torch.from_numpy((np.arange(MAX_TOKENS) < lengths[:, None]).astype(np.float64))
    # what the wire carries is float32
    old = torch.from_numpy(generator.normal(-2, 1, mask.shape).astype(np.float32)).double()
    logprobs = old + torch.from_numpy(generator.normal(0, moved, mask.shape))
    rewards = generator.normal(size=count)
    return logprobs.requires_grad_(), old, rewards, mask


def our_loss(objective, logprobs, old, rewards, mask, **columns):
    """The same through our objective, from rewards to the loss."""
    lengths = mask.sum(1).long()
    inside = mask.bool()
    tokens = tokens_of(
        rewards,
        np.repeat(np.arange(GROUPS), SAMPLES),
        lengths.tolist(),
        old[inside].numpy(),
        **{name: column[inside].numpy() for name, column in columns.items()},
    )
    prepared = objective.prepare(tokens)
    advantages = objective.advantage(tokens, nothing(tokens)).advantages
    inputs = LossInputs(
        logprobs=logprobs[inside],
        entropy=torch.zeros(int(lengths.sum()), dtype=torch.float64),
        sequences=Sequences.of_lengths(lengths),
        behaviour_logprobs=old[inside],
        advantages=torch.from_numpy(advantages),
        weights=torch.from_numpy(prepared.columns["weights"]).double(),
        ages=torch.zeros(int(lengths.sum())),
        **{name: column[inside] for name, column in columns.items() if name != "values"},
    )
    return objective.loss(inputs).loss, advantages[tokens.starts]


def objective_of(**settings):
    return policy_optimization(PolicyAlgorithm.model_validate(settings), MAX_TOKENS)


def assert_same_value_and_gradient(ours, theirs, logprobs):
    (found,) = torch.autograd.grad(ours, logprobs, retain_graph=True)
    (expected,) = torch.autograd.grad(theirs, logprobs)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert expected.abs().max() > 1e-3


CASES = {
    "grpo": ("grpo", {"clip_low": 0.2, "clip_high": 0.2}, {}),
    "dr_grpo": ("dr_grpo", {"clip_low": 0.2, "clip_high": 0.2, "max_tokens": MAX_TOKENS}, {}),
    "dapo": ("dapo", {"clip_low": 0.2, "clip_high": 0.28}, {}),
    "gspo": (
        "grpo",
        {"clip_low": 0.1, "clip_high": 0.15, "level": "sequence"},
        {"loss": {"clip_low": 0.1, "clip_high": 0.15}},
    ),
    "cispo": ("cispo", {"clip_low": 0.2, "clip_high": 1.28}, {}),
}


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 10_000))
def test_losses_are_trls_in_value_and_gradient(name, seed):
    loss_type, settings, ours = CASES[name]
    logprobs, old, rewards, mask = padded_batch(seed)
    loss, advantages = our_loss(objective_of(type=name, **ours), logprobs, old, rewards, mask)
    theirs = trl_losses.grpo_loss(
        loss_type, logprobs, old, torch.from_numpy(advantages), mask, **settings
    )
    assert_same_value_and_gradient(loss, theirs, logprobs)


@given(seed=st.integers(0, 10_000))
def test_ppos_loss_for_advantages_of_tokens_is_trls(seed):
    logprobs, old, rewards, mask = padded_batch(seed)
    inside = mask.bool()
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=mask.shape))
    objective = objective_of(type="ppo")
    tokens = tokens_of(
        rewards,
        np.repeat(np.arange(GROUPS), SAMPLES),
        mask.sum(1).long().tolist(),
        old[inside].numpy(),
        values=values[inside].numpy(),
    )
    of_tokens = objective.advantage(tokens, nothing(tokens)).advantages
    advantages = torch.zeros_like(old)
    advantages[inside] = torch.from_numpy(of_tokens)
    loss, _ = our_loss(objective, logprobs, old, rewards, mask, values=values)
    theirs = trl_losses.grpo_loss(
        "bnpo", logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.2
    )
    assert_same_value_and_gradient(loss, theirs, logprobs)


@given(seed=st.integers(0, 10_000))
def test_rloo_by_the_ratio_of_samples_is_trls(seed):
    logprobs, old, rewards, mask = padded_batch(seed, moved=0.05)
    objective = objective_of(
        type="rloo",
        loss={
            "type": "sequence_clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "length_normalized": False,
        },
        aggregation="sequence_mean",
    )
    loss, advantages = our_loss(objective, logprobs, old, rewards, mask)
    theirs = trl_losses.rloo_loss(
        logprobs, old, torch.from_numpy(advantages), mask, clip_low=0.2, clip_high=0.2
    )
    assert_same_value_and_gradient(loss, theirs, logprobs)


@given(seed=st.integers(0, 10_000))
def test_the_reference_penalty_is_trls_k3(seed):
    logprobs, old, rewards, mask = padded_batch(seed)
    reference = old + 0.3
    objective = objective_of(type="grpo", reference={"coefficient": 0.04})
    loss, advantages = our_loss(
        objective, logprobs, old, rewards, mask, reference_logprobs=reference
    )
    theirs = trl_losses.grpo_loss(
        "grpo",
        logprobs,
        old,
        torch.from_numpy(advantages),
        mask,
        clip_low=0.2,
        clip_high=0.2,
        beta=0.04,
        reference=reference,
    )
    assert_same_value_and_gradient(loss, theirs, logprobs)


@given(seed=st.integers(0, 10_000))
def test_advantages_of_groups_are_trls(seed):
    """As `_generate_and_score_completions` of its trainers writes them, with its own nanstd."""
    from trl.trainer.utils import nanstd

    rewards = torch.from_numpy(np.random.default_rng(seed).normal(size=(GROUPS, SAMPLES)))
    groups = np.repeat(np.arange(GROUPS), SAMPLES)
    tokens = tokens_of(rewards.flatten().numpy(), groups, [1] * rewards.numel())
    centred = rewards - torch.nanmean(rewards, dim=1, keepdim=True)
    scaled = centred / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    siblings = (torch.nansum(rewards, dim=1, keepdim=True) - rewards) / (SAMPLES - 1)
    for estimator, expected in (
        (GroupRelative(epsilon=1e-4), scaled),
        (GroupRelative(normalize_std=False), centred),
        (LeaveOneOut(), rewards - siblings),
    ):
        found = estimator(tokens, nothing(tokens)).advantages
        np.testing.assert_allclose(found, expected.flatten().numpy(), atol=1e-9)


@pytest.fixture(scope="module")
def rllib_targets():
    """RLlib's GAE, found without importing the rest of RLlib, which wants gymnasium."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ray.rllib", "ray.rllib.utils", "ray.rllib.utils.postprocessing"):
            package = ModuleType(name)
            package.__path__ = [str(Path(ray.__file__).parent.joinpath(*name.split(".")[1:]))]
            patch.setitem(sys.modules, name, package)
        module = "ray.rllib.utils.postprocessing.value_predictions"
        found = importlib.import_module(module).compute_value_targets
        yield found
        sys.modules.pop(module, None)


@pytest.mark.parametrize(("discount", "trace_decay"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0)])
def test_gae_is_rllibs(rllib_targets, discount, trace_decay):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 20, 30)
    count = int(lengths.sum())
    penalties, values = generator.normal(size=(2, count)).astype(np.float32)
    outcome = generator.normal(size=len(lengths))
    tokens = tokens_of(outcome, np.arange(len(lengths)), lengths, values=values)
    estimate = GeneralizedAdvantage(discount, trace_decay, normalize=False)(
        tokens, penalties.astype(float)
    )
    ends = np.cumsum(lengths) - 1
    rewards, terminated = penalties.astype(np.float64), np.zeros(count)
    rewards[ends] += outcome
    terminated[ends] = 1.0
    expected = rllib_targets(
        values.astype(np.float64), rewards, terminated, np.zeros(count), discount, trace_decay
    )
    np.testing.assert_allclose(estimate.returns, expected, rtol=1e-5, atol=1e-5)


def test_the_quick_starts_objective_is_the_one_compared_with_trl_in_bench_e2e():
    config = load_config("quickstart").algorithm
    dapo = PolicyAlgorithm.model_validate({"type": "dapo"})
    assert (config.advantage, config.loss, config.aggregation) == (
        dapo.advantage,
        dapo.loss,
        dapo.aggregation,
    )
