"""The objective: how parts are joined, averaged, masked and reported."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.errors import NonFiniteError
from paceline.learner.objective.advantages import GeneralizedAdvantage, GroupRelative, Outcome
from paceline.learner.objective.aggregation import token_weights
from paceline.learner.objective.losses.corrections import MaskOutside, SecondMoment, Truncate
from paceline.learner.objective.losses.policy import Clip, ClippedWeight, Reinforce, SequenceClip
from paceline.learner.objective.objective import (
    Objective,
    OverlongPenalty,
    ReferencePenalty,
    check_advantages,
    derived_metrics,
    split_by_group,
)
from tests.learner.batch.token_tables import inputs_of, token_tables, tokens_of

PLAIN = Objective(Outcome(), Clip(0.2, 0.28), "token_mean", max_tokens=8)


def gradient(objective, given_inputs):
    outputs = objective.loss(given_inputs)
    outputs.loss.backward()
    return outputs, given_inputs.logprobs.grad.tolist()


def test_the_loss_is_the_weighted_sum_of_its_tokens():
    outputs, found = gradient(PLAIN, inputs_of([1.0, 1.5, 0.5], [2.0, 2.0, -2.0]))
    assert outputs.loss.item() == pytest.approx((-2.0 - 2.56 + 1.6) / 3)
    assert found == pytest.approx([-2.0 / 3, 0.0, 0.0])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 4] * 4),
        ("sequence_mean", [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
        ("fixed_length", [1 / 20] * 4),
        ("group_sum", [1 / 1] * 4),
    ],
)
def test_aggregation_by_hand(aggregation, expected):
    lengths = np.array([1, 3])
    np.testing.assert_allclose(token_weights(aggregation, lengths, 10, num_groups=1), expected)


@given(tokens=token_tables(), num_updates=st.integers(1, 5))
def test_every_sample_is_in_one_update_and_each_updates_weights_sum_to_one(tokens, num_updates):
    objective = replace(PLAIN, num_updates=num_updates)
    for aggregation in ("token_mean", "sequence_mean"):
        prepared = replace(objective, aggregation=aggregation).prepare(tokens)
        assert sorted(np.concatenate(prepared.updates)) == list(range(len(tokens.rewards)))
        weights = tokens.sums(prepared.columns["weights"])
        for samples in prepared.updates:
            assert weights[samples].sum() == pytest.approx(1, abs=1e-6)
            others = np.setdiff1d(np.arange(len(tokens.rewards)), samples)
            assert not np.intersect1d(tokens.groups[samples], tokens.groups[others]).size


def test_fewer_groups_than_updates_make_as_many_updates_as_groups():
    updates = split_by_group(np.array([0, 0, 1]), 4)
    assert [samples.tolist() for samples in updates] == [[0, 1], [2]]


def test_decoupled_ppo_clips_by_the_proximal_policy_and_weighs_by_the_behaviour_policy():
    decoupled = replace(PLAIN, old_policy="recomputed", corrections=(Truncate(5.0),))
    # one update a step: the proximal policy is the current one, nothing is clipped
    _, found = gradient(decoupled, inputs_of([3.0, 0.5, 7.0], [1.0, -1.0, 1.0]))
    assert found == pytest.approx([-3.0 / 3, 0.5 / 3, -5.0 / 3])
    # a later update: ratios of 2 to the behaviour and 1.5 to the proximal policy
    later = inputs_of([2.0, 2.0], [1.0, -1.0], proximal_logprobs=[-2 + math.log(2 / 1.5)] * 2)
    outputs, found = gradient(decoupled, later)
    weight = 2 / 1.5
    assert outputs.loss.item() == pytest.approx(weight * (-1.28 + 1.5) / 2)
    assert found == pytest.approx([0.0, weight * 1.5 / 2])


def test_a3po_stands_in_for_the_proximal_policy_by_age():
    """Of age d the ratio is r^(1/d), and the weight what is left of r."""
    objective = replace(
        PLAIN,
        policy_loss=Clip(0.9, 9.0),
        old_policy="interpolated",
        corrections=(Truncate(100.0),),
    )
    ages = [0.0, 1.0, 3.0]
    outputs, found = gradient(objective, inputs_of([1.7] * 3, [1.0] * 3, ages=ages))
    # ratio times weight is the whole ratio, however it is divided between them
    assert outputs.loss.item() == pytest.approx(-1.7)
    assert found == pytest.approx([-1.7 / 3] * 3)
    tight = replace(objective, policy_loss=Clip(0.2, 0.28))
    _, found = gradient(tight, inputs_of([1.7] * 3, [1.0] * 3, ages=ages))
    # 1 and 1.7^(1/3) = 1.19 lie within the bounds, 1.7 does not
    assert found == pytest.approx([-1.7 / 3, 0.0, -1.7 / 3])


def test_a_masked_token_has_no_gradient_though_its_loss_be_infinite():
    objective = replace(PLAIN, old_policy="recomputed", corrections=(MaskOutside(0.5, 5.0),))
    inputs = inputs_of([1.0, 1.0], [1.0, -1.0])
    far = replace(inputs, behaviour_logprobs=torch.tensor([-2.0, -1e4], dtype=torch.float64))
    outputs, found = gradient(objective, far)
    assert outputs.loss.item() == pytest.approx(-0.5)
    assert found == pytest.approx([-0.5, 0.0])
    assert outputs.metrics["masked_fraction"].item() == 1


def test_a_correction_weighs_and_is_not_differentiated():
    """REINFORCE of samples of another policy: the gradient is the ratio times the advantage."""
    objective = replace(PLAIN, policy_loss=Reinforce(), corrections=(Truncate(cap=3.0),))
    _, found = gradient(objective, inputs_of([2.0, 0.5, 4.0], [1.0, -2.0, 1.0]))
    assert found == pytest.approx([-2.0 / 3, 1.0 / 3, -3.0 / 3])


def test_the_loss_divides_by_all_tokens_also_where_some_are_masked():
    masking = replace(PLAIN, old_policy="recomputed", corrections=(MaskOutside(0.5, 5.0),))
    _, found = gradient(masking, inputs_of([1.0, 9.0], [1.0, 1.0]))
    assert found == pytest.approx([-1 / 2, 0.0])


def test_the_reference_in_the_loss_pulls_towards_it():
    objective = replace(PLAIN, reference=ReferencePenalty(0.1, "k3", "loss"))
    inputs = inputs_of([1.0, 1.0], [0.0, 0.0], reference_logprobs=[-2.0, -2.0 + math.log(2)])
    outputs, found = gradient(objective, inputs)
    # (1 - q / p) of the second token, whose reference finds it twice as likely
    assert found == pytest.approx([0.0, 0.1 * (1 - 2) / 2])
    assert outputs.metrics["reference_kl"].item() == pytest.approx(1 - math.log(2))


def test_the_reference_in_the_reward_lowers_outcomes_and_not_the_loss():
    tokens = tokens_of(
        [1.0, 1.0], [0, 0], [1, 2], [-1.0, -1.0, -1.0], reference_logprobs=[-1.0, -2.0, -1.5]
    )
    objective = Objective(
        GroupRelative(normalize_std=False),
        Clip(),
        "token_mean",
        8,
        reference=ReferencePenalty(0.1, "k1", "reward"),
    )
    assert objective.passes == {"reference"}
    found = objective.prepare(tokens).columns["advantages"]
    np.testing.assert_allclose(found, [0.075, -0.075, -0.075], rtol=1e-5)
    inputs = inputs_of([1.0], [0.0], reference_logprobs=[-5.0])
    assert gradient(objective, inputs)[1] == [0.0]


def test_the_entropy_bonus_is_taken_off_the_loss():
    inputs = inputs_of([1.0, 1.0], [0.0, 0.0], entropy=[0.5, 0.7])
    outputs = replace(PLAIN, entropy_coefficient=0.1).loss(inputs)
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(-0.1 * 0.6)
    assert inputs.entropy.grad.tolist() == pytest.approx([-0.05, -0.05])


def test_overlong_completions_lose_reward_linearly_up_to_the_limit():
    penalty = OverlongPenalty(max_tokens=10, buffer_tokens=4, penalty=2.0)
    np.testing.assert_allclose(penalty(np.array([1, 6, 7, 9, 10])), [0, 0, -0.5, -1.5, -2])
    tokens = tokens_of([1.0, 1.0], [0, 0], [1, 10])
    shaped = replace(PLAIN, overlong=penalty).prepare(tokens)
    assert shaped.columns["advantages"][[0, 1]].tolist() == [1.0, -1.0]


def test_m2po_drops_tokens_of_the_whole_batch():
    objective = replace(PLAIN, second_moment=SecondMoment(0.04))
    assert objective.passes == {"proximal"}
    tokens = tokens_of([1.0], [0], [3], [-1.0] * 3, proximal_logprobs=[-1.0, -3.0, -1.1])
    prepared = objective.prepare(tokens)
    assert prepared.columns["advantages"].tolist() == [1.0, 0.0, 1.0]
    assert prepared.metrics["second_moment_masked"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "policy_loss", [Clip(0.2, 0.28), SequenceClip(0.1, 0.1), ClippedWeight(), Reinforce()]
)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
@given(data=st.data())
def test_a_batch_split_into_microbatches_has_the_same_loss_and_gradient(
    policy_loss, aggregation, data
):
    tokens = data.draw(token_tables(max_groups=3))
    count = int(tokens.lengths.sum())
    ratios = data.draw(st.lists(st.floats(0.5, 2), min_size=count, max_size=count))
    objective = replace(PLAIN, policy_loss=policy_loss, aggregation=aggregation)
    columns = objective.prepare(tokens).columns

    def part(samples):
        rows = np.concatenate(
            [np.arange(tokens.starts[s], tokens.starts[s] + tokens.lengths[s]) for s in samples]
        )
        inputs = inputs_of(
            [ratios[r] for r in rows],
            columns["advantages"][rows].tolist(),
            tokens.lengths[samples].tolist(),
            weights=columns["weights"][rows].tolist(),
        )
        outputs, found = gradient(objective, inputs)
        return outputs.loss.item(), found

    everything = np.arange(len(tokens.rewards))
    cut = data.draw(st.integers(0, len(everything)))
    whole_loss, whole = part(everything)
    parts = [part(p) for p in (everything[:cut], everything[cut:]) if len(p)]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole_loss, abs=1e-9)
    assert [g for _, found in parts for g in found] == pytest.approx(whole, abs=1e-9)


def test_metrics_of_four_tokens():
    ratios = [1.0, 1.5, 0.5, 2.0]
    outputs = PLAIN.loss(
        inputs_of(
            ratios, [1.0, 1.0, 1.0, 0.0], entropy=[0.1, 0.2, 0.3, 0.4], ages=[0.0, 1.0, 0.0, 2.0]
        )
    )
    expected = {
        "ratio": 5.0,
        "ratio_square": 7.5,
        "clip_fraction": 1.0,
        "masked_fraction": 0.0,
        "correction_weight": 4.0,
        "entropy": 1.0,
        "kl": sum(r - 1 - math.log(r) for r in ratios),
        "mismatch": math.log(1.5) + 2 * math.log(2),
        "fresh_mismatch": math.log(2),
        "fresh_fraction": 2.0,
    }
    assert {k: v.item() for k, v in outputs.metrics.items()} == pytest.approx(expected, rel=1e-5)
    maxima = {k: v.item() for k, v in outputs.maxima.items()}
    assert maxima == pytest.approx({"ratio_max": 2.0, "mismatch_max": math.log(2)}, rel=1e-5)


def test_derived_metrics_by_hand():
    found = derived_metrics(
        {"ratio": 1.25, "ratio_square": 1.875, "fresh_mismatch": 0.1, "fresh_fraction": 0.5}
    )
    assert found == pytest.approx(
        {"ratio": 1.25, "ess": 1.25**2 / 1.875, "mismatch_fresh": 0.2, "fresh_fraction": 0.5}
    )
    assert derived_metrics({"entropy": 1.0}) == {"entropy": 1.0}


def test_a_non_finite_advantage_is_named_by_group_and_sample():
    tokens = tokens_of([0.0, 0.0, 0.0], [0, 1, 1], [1, 1, 1])
    with pytest.raises(NonFiniteError, match="sample 1 of group 101 is inf at its trained token 0"):
        check_advantages(tokens, np.array([0.0, 1.0, np.inf]))
    with pytest.raises(AssertionError, match="one advantage a trained token"):
        check_advantages(tokens, np.zeros(2))


def test_an_objective_travels_to_the_ranks_by_pickle():
    objective = Objective(
        GeneralizedAdvantage(), SequenceClip(), "fixed_length", 8, corrections=(Truncate(),)
    )
    assert pickle.loads(pickle.dumps(objective)) == objective
