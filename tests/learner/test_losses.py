"""Losses against numbers worked out by hand, and gradients where clipping must stop them."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.learner.losses import (
    ClippedPolicyLoss,
    LossInputs,
    kl_estimate,
    negative_log_likelihood,
)


def inputs(ratios, advantages, entropy=None):
    behaviour = torch.full((len(ratios),), -2.0)
    logprobs = (behaviour + torch.tensor(ratios).log()).requires_grad_()
    return LossInputs(
        logprobs,
        behaviour,
        torch.tensor(advantages),
        torch.tensor(entropy or [0.0] * len(ratios)),
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.56),  # 1 + 0.28 bounds what a good token can gain
        (0.5, 2.0, -1.0),  # but not what it can lose
        (0.5, -2.0, 1.6),  # 1 - 0.2 bounds what a bad token can gain
        (1.5, -2.0, 3.0),
    ],
)
def test_clipped_loss_of_one_token(ratio, advantage, loss):
    outputs = ClippedPolicyLoss(0.2, 0.28)(inputs([ratio], [advantage]))
    assert outputs.loss_sum.item() == pytest.approx(loss, rel=1e-5)


def test_gradient_is_ratio_times_advantage_and_zero_where_clipped():
    given_inputs = inputs([1.0, 1.5, 0.5, 1.5], [2.0, 2.0, -2.0, -2.0])
    ClippedPolicyLoss(0.2, 0.28)(given_inputs).loss_sum.backward()
    torch.testing.assert_close(given_inputs.logprobs.grad, torch.tensor([-2.0, 0.0, 0.0, 3.0]))


def test_metrics_of_four_tokens():
    outputs = ClippedPolicyLoss(0.2, 0.28)(
        inputs([1.0, 1.5, 0.5, 2.0], [1.0, 1.0, 1.0, 0.0], entropy=[0.1, 0.2, 0.3, 0.4])
    )
    expected = {
        "ratio": 5.0,
        "clip_fraction": 1.0,
        "entropy": 1.0,
        "kl": sum(r - 1 - math.log(r) for r in (1.0, 1.5, 0.5, 2.0)),
        "mismatch": math.log(1.5) + 2 * math.log(2),
    }
    assert {k: v.item() for k, v in outputs.metrics.items()} == pytest.approx(expected, rel=1e-5)
    maxima = {k: v.item() for k, v in outputs.maxima.items()}
    assert maxima == pytest.approx({"ratio_max": 2.0, "mismatch_max": math.log(2)}, rel=1e-5)


def test_negative_log_likelihood_is_the_sum_and_ignores_advantages():
    given_inputs = inputs([1.0, 2.0], [float("nan"), -3.0])
    outputs = negative_log_likelihood(given_inputs)
    assert outputs.loss_sum.item() == pytest.approx(4.0 - math.log(2), rel=1e-6)
    outputs.loss_sum.backward()
    torch.testing.assert_close(given_inputs.logprobs.grad, torch.tensor([-1.0, -1.0]))


@given(st.floats(-5, 5))
def test_kl_estimate_is_never_negative_and_zero_only_without_change(log_ratio):
    estimate = kl_estimate(torch.tensor(log_ratio, dtype=torch.float64)).item()
    assert estimate >= 0
    assert (estimate < 1e-12) == (abs(log_ratio) < 1.5e-6)


def test_kl_estimate_averages_to_the_true_divergence():
    behaviour = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    current = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mean = (behaviour * kl_estimate((current / behaviour).log())).sum()
    torch.testing.assert_close(mean, (behaviour * (behaviour / current).log()).sum())


@pytest.mark.parametrize("loss", [ClippedPolicyLoss(0.2, 0.28), negative_log_likelihood])
def test_losses_travel_to_the_ranks_by_pickle(loss):
    assert pickle.loads(pickle.dumps(loss)) == loss
