"""Policy losses by hand, and where their gradient must be what."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.learner.objective.losses.divergence import divergence
from paceline.learner.objective.losses.policy import (
    Clip,
    ClippedWeight,
    NegativeLogLikelihood,
    PolicyTerms,
    Reinforce,
    SequenceClip,
)
from paceline.learner.objective.losses.value import value_loss
from tests.learner.batch.token_tables import inputs_of

EVERY_LOSS = [
    Clip(0.2, 0.28),
    Clip(0.2, 0.2, 3.0),
    SequenceClip(),
    ClippedWeight(0.0, 1.28),
    Reinforce(),
    NegativeLogLikelihood(),
]


def losses_and_gradient(loss, ratios, advantages, lengths=None):
    given_inputs = inputs_of(ratios, advantages, lengths)
    terms = PolicyTerms(
        given_inputs.logprobs,
        given_inputs.logprobs - given_inputs.behaviour_logprobs,
        given_inputs.advantages,
        given_inputs.sequences,
    )
    found = loss(terms)
    found.loss.sum().backward()
    return found.loss.tolist(), given_inputs.logprobs.grad.tolist(), found.is_clipped.tolist()


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
    assert losses_and_gradient(Clip(0.2, 0.28), [ratio], [advantage])[0] == pytest.approx([loss])


def test_gradient_is_ratio_times_advantage_and_zero_where_clipped():
    _, gradient, clipped = losses_and_gradient(
        Clip(0.2, 0.28), [1.0, 1.5, 0.5, 1.5], [2.0, 2.0, -2.0, -2.0]
    )
    assert gradient == pytest.approx([-2.0, 0.0, 0.0, 3.0])
    assert clipped == [False, True, True, False]


def test_dual_clip_bounds_what_a_bad_token_costs():
    losses, gradient, clipped = losses_and_gradient(
        Clip(0.2, 0.2, 3.0), [5.0, 2.0, 5.0], [-1.0, -1.0, 1.0]
    )
    assert losses == pytest.approx([3.0, 2.0, -1.2])
    assert gradient == pytest.approx([0.0, 2.0, 0.0])
    assert clipped == [True, False, True]


def test_gspo_uses_the_geometric_mean_ratio_of_the_sample():
    ratios, advantages = [1.2, 1.2, 0.5, 2.0], [1.0, 1.0, -1.0, -1.0]
    losses, gradient, _ = losses_and_gradient(SequenceClip(0.3, 0.3), ratios, advantages, [2, 2])
    assert losses == pytest.approx([-1.2, -1.2, 1.0, 1.0])
    # each token's share of its sample's mean log-ratio, twice: both tokens carry the ratio
    assert gradient == pytest.approx([-1.2, -1.2, 1.0, 1.0])


def test_gspo_stops_whole_samples():
    _, gradient, clipped = losses_and_gradient(
        SequenceClip(3e-4, 4e-4), [1.001, 1.001, 1.0], [1.0, 1.0, 1.0], [2, 1]
    )
    assert gradient == pytest.approx([0.0, 0.0, -1.0])
    assert clipped == [True, True, False]


def test_cispo_bounds_the_weight_and_never_the_gradient():
    losses, gradient, clipped = losses_and_gradient(
        ClippedWeight(0.0, 1.5), [3.0, 1.2, 0.1], [2.0, 2.0, -1.0]
    )
    weights = [1.5, 1.2, 0.1]
    assert gradient == pytest.approx(
        [-w * a for w, a in zip(weights, [2.0, 2.0, -1.0], strict=True)]
    )
    assert losses[0] == pytest.approx(-1.5 * 2.0 * (-2.0 + math.log(3.0)))
    assert clipped == [True, False, False]


@pytest.mark.parametrize("loss", [Clip(), SequenceClip(0.5, 0.5), ClippedWeight(), Reinforce()])
@given(advantages=st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_on_policy_every_loss_has_the_gradient_of_the_plain_policy_gradient(loss, advantages):
    """A sample's advantage is the same for all its tokens, as with outcomes."""
    same = [advantages[0]] * len(advantages)
    _, gradient, clipped = losses_and_gradient(loss, [1.0] * len(same), same)
    assert gradient == pytest.approx([-a for a in same], abs=1e-9)
    assert not any(clipped)


@pytest.mark.parametrize("loss", EVERY_LOSS[:-1])
@given(ratios=st.lists(st.floats(0.2, 5), min_size=1, max_size=6))
def test_no_advantage_no_gradient(loss, ratios):
    _, gradient, _ = losses_and_gradient(loss, ratios, [0.0] * len(ratios))
    assert gradient == pytest.approx([0.0] * len(ratios), abs=0)


@given(
    ratios=st.lists(st.floats(0.2, 5), min_size=1, max_size=8),
    data=st.data(),
)
def test_a_clipped_token_has_no_gradient_and_any_other_has_one(ratios, data):
    advantages = data.draw(
        st.lists(
            st.sampled_from([-1.5, -0.5, 0.5, 1.5]), min_size=len(ratios), max_size=len(ratios)
        )
    )
    _, gradient, clipped = losses_and_gradient(Clip(0.2, 0.28), ratios, advantages)
    assert [g == 0 for g in gradient] == clipped


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_losses_travel_to_the_ranks_by_pickle(loss):
    assert pickle.loads(pickle.dumps(loss)) == loss


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_divergence(estimator):
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mean = (p * divergence((q / p).log(), estimator)).sum()
    torch.testing.assert_close(mean, (p * (p / q).log()).sum())


@given(st.floats(-5, 5))
def test_k2_and_k3_are_never_negative_and_zero_only_without_change(log_ratio):
    for estimator in ("k2", "k3"):
        estimate = divergence(torch.tensor(log_ratio, dtype=torch.float64), estimator).item()
        assert estimate >= 0
        assert (estimate < 1e-12) == (abs(log_ratio) < 1.5e-6)


@pytest.mark.parametrize(
    ("estimator", "target"), [("k1", None), ("k2", "reverse"), ("k3", "forward")]
)
def test_expected_gradients_of_the_estimators_as_losses(estimator, target):
    """k1 has none, k2 that of KL(p || q), k3 that of KL(q || p)."""
    logits = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    log_p = logits.log_softmax(0)
    sampled = (log_p.detach().exp() * divergence(q.log() - log_p, estimator)).sum()
    (found,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    if target is None:
        torch.testing.assert_close(found, torch.zeros_like(found))
        return
    p = log_p.exp()
    exact = (p * (log_p - q.log())).sum() if target == "reverse" else (q * (q.log() - log_p)).sum()
    (expected,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(found, expected)


def test_value_loss_by_hand():
    values, old = torch.tensor([1.0, 0.1, 0.4]), torch.tensor([0.0, 0.0, 0.3])
    returns = torch.tensor([1.0, 1.0, 0.0])
    # the first moved beyond 0.2 and is judged where it was held; the others stayed within
    expected = torch.tensor([0.64, 0.81, 0.16]) / 2
    torch.testing.assert_close(value_loss(values, old, returns, 0.2), expected)
    plain = torch.tensor([0.0, 0.81, 0.16]) / 2
    torch.testing.assert_close(value_loss(values, old, returns, None), plain)
