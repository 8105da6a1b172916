"""What the peers compute, by hand: a comparison is worth what its other side is."""

from __future__ import annotations

import math

import pytest
import torch

from tests.learner.peers import reference_losses
from tests.learner.peers.trl_steps import Samples, dpo_loss, grpo_step, rloo_step


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def samples_of(lengths, rewards, ratios, **columns):
    """A group whose trained policy has these ratios to every other one."""
    start = torch.full((sum(lengths),), -2.0, dtype=torch.float64)
    of_tokens = {
        "behaviour_logprobs": start,
        "proximal_logprobs": start,
        "reference_logprobs": start,
        "entropy": torch.zeros_like(start),
    }
    return Samples(
        lengths=torch.tensor(lengths),
        rewards=column(*rewards),
        group_size=len(lengths),
        logprobs=(start + column(*ratios).log()).requires_grad_(),
        **(of_tokens | columns),
    )


def test_trls_deviation_is_of_a_sample_and_its_epsilon_a_ten_thousandth():
    samples = samples_of([1, 1, 1], [0.0, 1.0, 2.0], [1.0] * 3)
    found = grpo_step(samples, "grpo", 4).batch["advantages"]
    torch.testing.assert_close(found, column(-1, 0, 1) / (1 + 1e-4))
    centred = grpo_step(samples, "dr_grpo", 4, scale_rewards="none").batch["advantages"]
    torch.testing.assert_close(centred, column(-1, 0, 1))


def test_trls_baseline_of_rloo_leaves_the_sample_out():
    found = rloo_step(samples_of([1, 1, 1], [0.0, 1.0, 5.0], [1.0] * 3)).batch["advantages"]
    torch.testing.assert_close(found, column(0 - 3, 1 - 2.5, 5 - 0.5))


@pytest.mark.parametrize(
    ("loss_type", "weights"),
    [
        ("grpo", (1 / 2, 1 / 6)),
        ("dr_grpo", (1 / 16, 1 / 16)),
        ("dapo", (1 / 4, 1 / 4)),
        ("cispo", (1 / 4, 1 / 4)),
    ],
)
def test_trls_averages(loss_type, weights):
    """Samples of one and of three tokens, of at most eight, with advantages 1 and -1."""
    settings = {"scale_rewards": "none", "epsilon_high": 2.0}
    samples = samples_of([1, 3], [2.0, 0.0], [1.0] * 4)
    loss = grpo_step(samples, loss_type, 8, **settings).loss
    (found,) = torch.autograd.grad(loss, samples.logprobs)
    torch.testing.assert_close(found, column(-weights[0], *[weights[1]] * 3))


def test_trl_clips_what_an_advantage_would_push_further():
    samples = samples_of([2, 2], [2.0, 0.0], [1.5, 0.5, 1.5, 0.5])
    step = grpo_step(samples, "dapo", 8, scale_rewards="none", epsilon_high=0.28)
    (found,) = torch.autograd.grad(step.loss, samples.logprobs)
    torch.testing.assert_close(found, column(0, -0.5, 1.5, 0) / 4)
    assert step.loss.item() == pytest.approx((-1.28 - 0.5 + 1.5 + 0.8) / 4)


def test_trls_bound_of_cispo_is_the_weight_itself_and_there_is_none_below():
    samples = samples_of([2, 2], [2.0, 0.0], [1.5, 0.01, 1.5, 0.01])
    loss = grpo_step(samples, "cispo", 8, scale_rewards="none", epsilon_high=1.28).loss
    (found,) = torch.autograd.grad(loss, samples.logprobs)
    torch.testing.assert_close(found, column(-1.28, -0.01, 1.28, 0.01) / 4)


def test_trls_ratio_of_sequences_is_the_geometric_mean_for_gspo_and_the_product_for_rloo():
    samples = samples_of([2, 1], [2.0, 0.0], [1.1, 1.3, 1.0])
    settings = {"scale_rewards": "none", "epsilon_low": 0.9, "epsilon_high": 0.9}
    gspo = grpo_step(samples, "grpo", 8, importance_sampling_level="sequence", **settings)
    assert gspo.loss.item() == pytest.approx((-math.sqrt(1.1 * 1.3) + 1) / 2)
    rloo = rloo_step(samples, epsilon_low=0.9, epsilon_high=0.9)
    assert rloo.loss.item() == pytest.approx((-2 * 1.1 * 1.3 + 2) / 2)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [0.5, 2.0, 1.5]),
        ("token_mask", [0.5, 0.0, 1.5]),
        ("sequence_truncate", [1.25, 1.5]),
        ("sequence_mask", [1.25, 1.5]),
    ],
)
def test_trl_weighs_by_the_start_of_the_step_over_the_engine(mode, expected):
    samples = samples_of(
        [2, 1], [1.0, 0.0], [1.0] * 3, proximal_logprobs=column(0.5, 2.5, 1.5).log() - 2
    )
    found = grpo_step(
        samples,
        "dapo",
        8,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=2.0,
    ).batch["importance_sampling_ratio"]
    inside = found.flatten() if mode.startswith("sequence") else found.flatten()[:3]
    torch.testing.assert_close(inside, column(*expected))


def test_trls_entropy_and_reference_terms():
    samples = samples_of(
        [1, 3],
        [1.0, 1.0],
        [1.0] * 4,
        entropy=column(1, 2, 3, 4),
        reference_logprobs=column(-2, -2, -2, -2 + math.log(2)),
    )
    # of all tokens alike, also where samples are averaged
    bonus = grpo_step(samples, "grpo", 8, entropy_coef=0.1).loss
    assert bonus.item() == pytest.approx(-0.1 * 2.5)
    penalty = grpo_step(samples, "grpo", 8, beta=0.1).loss
    assert penalty.item() == pytest.approx(0.1 * (2 - 1 - math.log(2)) / 3 / 2)
    in_reward = rloo_step(samples, beta=0.1).batch["advantages"]
    torch.testing.assert_close(in_reward, column(-1, 1) * 0.1 * math.log(2))


def test_trls_dpo_is_of_sums_and_prefers_the_higher_reward():
    samples = samples_of([2, 1, 1, 1], [0.0, 1.0, 7.0, 2.0], [1.2, 1.5, 3.0, 2.0, 1.0])
    first, second = 0.5 * math.log(3 / 1.8), 0.5 * math.log(2)
    expected = (math.log1p(math.exp(-first)) + math.log1p(math.exp(-second))) / 2
    assert dpo_loss(samples, 0.5).item() == pytest.approx(expected)


def test_reference_advantages_by_hand():
    found = reference_losses.advantages([0.0, 1.0], [0.5, 0.25], 0.5, 0.5)
    assert found == pytest.approx([-0.375 + 0.25 * 0.75, 0.75])
    assert reference_losses.whitened([1.0, 3.0]) == pytest.approx([-1, 1])


def test_reference_losses_by_hand():
    logprobs = column(1.5, 0.5, 4.0).log()
    policy = reference_losses.policy_loss(logprobs, [0.0] * 3, [1.0, -1.0, -1.0], 0.2, 3.0)
    assert policy.item() == pytest.approx((-1.2 + 0.8 + 3.0) / 3)
    value = reference_losses.value_loss(column(1.0, 1.0, 0.1), [0.0] * 3, [1.0, 2.0, 0.0], 0.2)
    assert value.item() == pytest.approx((0.64 + 1.8**2 + 0.01) / 2 / 3)
