"""The schedule's shape, what decays, and that clipping is global."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paceline.configs.errors import NonFiniteError
from paceline.configs.schema.learner import OptimizerConfig
from paceline.learner.engines.optimizer import (
    build_optimizer,
    learning_rate,
    reset_state,
    take_step,
)


def config(**settings):
    return OptimizerConfig(**{"learning_rate": 1.0, "warmup_steps": 4, **settings})


def test_warm_up_rises_linearly_to_the_peak():
    rates = [learning_rate(step, config(), 100) for step in range(4)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1, 1)],
)
def test_decay_reaches_its_final_fraction_at_the_last_step(schedule, middle, last):
    settings = config(schedule=schedule, final_fraction=0.1)
    assert learning_rate(4, settings, 105) == pytest.approx(1.0)
    assert learning_rate(54, settings, 105) == pytest.approx(middle)
    assert learning_rate(104, settings, 105) == pytest.approx(last)
    assert learning_rate(1000, settings, 105) == pytest.approx(last)


def test_cosine_is_flatter_than_linear_at_both_ends():
    cosine, linear = config(schedule="cosine"), config(schedule="linear")
    assert learning_rate(14, cosine, 105) > learning_rate(14, linear, 105)
    assert learning_rate(94, cosine, 105) < learning_rate(94, linear, 105)


@given(
    st.sampled_from(["linear", "cosine", "constant"]),
    st.integers(0, 20),
    st.integers(1, 50),
    st.integers(0, 60),
)
def test_rate_is_positive_and_never_exceeds_the_peak(schedule, warmup_steps, num_steps, step):
    settings = config(schedule=schedule, warmup_steps=warmup_steps)
    assert 0 < learning_rate(step, settings, num_steps) <= 1.0 + 1e-12


def parameters():
    return [nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.full((2,), 3.0))]


def set_gradients(params, value=0.0):
    for param in params:
        param.grad = torch.full_like(param, value)


def test_weight_decay_shrinks_matrices_only():
    params = parameters()
    optimizer = build_optimizer(params)
    set_gradients(params)
    take_step(optimizer, config(weight_decay=0.5, warmup_steps=0, schedule="constant"), 0, 10)
    torch.testing.assert_close(params[0].detach(), torch.full((2, 2), 1.5))
    torch.testing.assert_close(params[1].detach(), torch.full((2,), 3.0))


def test_steps_equal_those_of_a_plain_adamw_on_clipped_gradients():
    ours, theirs = parameters(), parameters()
    optimizer = build_optimizer(ours)
    settings = config(warmup_steps=0, schedule="constant", max_grad_norm=1.0)
    reference = torch.optim.AdamW(
        theirs, lr=1.0, betas=settings.betas, eps=settings.epsilon, weight_decay=0
    )
    for value in (5.0, -2.0, 0.1):
        set_gradients(ours, value)
        report = take_step(optimizer, settings, 0, 10)
        norm = abs(value) * math.sqrt(6)
        assert report["grad_norm"] == pytest.approx(norm, rel=1e-5)
        set_gradients(theirs, value / max(1.0, norm))
        reference.step()
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)


def test_a_non_finite_gradient_is_refused_before_anything_is_written():
    params = parameters()
    optimizer = build_optimizer(params)
    set_gradients(params, 1.0)
    params[1].grad[0] = float("inf")
    with pytest.raises(NonFiniteError, match="gradient norm of step 3"):
        take_step(optimizer, config(), 3, 10)
    assert all((param == 3.0).all() for param in params)
    assert all(param.grad is None for param in params)
    assert not any(state["step"] for state in optimizer.state.values())


def test_a_reset_optimizer_steps_like_a_new_one():
    params, fresh_params = parameters(), parameters()
    used, fresh = build_optimizer(params), build_optimizer(fresh_params)
    set_gradients(params, 2.0)
    take_step(used, config(), 0, 10)
    reset_state(used)
    with torch.no_grad():
        for param in params:
            param.fill_(3.0)
    for optimizer, owned in ((used, params), (fresh, fresh_params)):
        set_gradients(owned, -0.3)
        take_step(optimizer, config(), 1, 10)
    for param, fresh_param in zip(params, fresh_params, strict=True):
        torch.testing.assert_close(param, fresh_param, rtol=0, atol=0)
