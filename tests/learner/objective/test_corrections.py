"""Corrections by hand, and what they leave alone."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.learner.objective.losses.corrections import (
    MaskAbove,
    MaskMastered,
    MaskOutside,
    RejectSequences,
    SecondMoment,
    Truncate,
)
from tests.learner.batch.token_tables import inputs_of, tokens_of


def weights(correction, ratios, lengths=None, advantages=None, **columns):
    given_inputs = inputs_of(ratios, advantages or [1.0] * len(ratios), lengths, **columns)
    log_weight = (given_inputs.logprobs - given_inputs.behaviour_logprobs).detach()
    found = correction(given_inputs, log_weight)
    assert not found.requires_grad
    return found.tolist()


def test_tis_truncates():
    assert weights(Truncate(2.0), [0.5, 1.9, 2.1, 40.0]) == pytest.approx([0.5, 1.9, 2.0, 2.0])


def test_tis_of_sequences_truncates_products():
    found = weights(Truncate(2.0, "sequence"), [0.5, 0.5, 1.5, 1.5], [2, 2])
    assert found == pytest.approx([0.25, 0.25, 2.0, 2.0])


def test_mis_masks_above_the_cap():
    assert weights(MaskAbove(2.0), [0.5, 1.9, 2.1]) == pytest.approx([0.5, 1.9, 0.0])
    found = weights(MaskAbove(2.0, "sequence"), [0.5, 0.5, 1.5, 1.5], [2, 2])
    assert found == pytest.approx([0.25, 0.25, 0.0, 0.0])


def test_icepop_masks_outside_the_range():
    assert weights(MaskOutside(0.5, 5.0), [0.4, 0.6, 4.0, 6.0]) == pytest.approx(
        [0.0, 0.6, 4.0, 0.0]
    )


def test_geometric_rejection_is_of_whole_samples_whatever_their_length():
    ratios = [1.1, 1 / 1.1, 1.1, 1.1, 1.1, 1.1]
    found = weights(RejectSequences(0.95, 1.05), ratios, [2, 1, 3])
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_mastered_tokens_are_those_of_good_narrow_samples_the_policy_is_sure_of():
    sure, unsure = 0.995 / math.exp(-2), 0.9 / math.exp(-2)
    ratios = [sure, unsure, sure, sure, sure]
    found = weights(
        MaskMastered(0.99, 0.2),
        ratios,
        [2, 1, 2],
        advantages=[1.0, 1.0, -1.0, 1.0, 1.0],
        entropy=[0.1, 0.1, 0.1, 0.5, 0.1],
    )
    assert found == [0.0, 1.0, 1.0, 1.0, 1.0]


PER_TOKEN = [
    Truncate(),
    MaskAbove(),
    MaskOutside(),
    RejectSequences(),
    Truncate(2.0, "sequence"),
    MaskAbove(2.0, "sequence"),
]


@pytest.mark.parametrize("correction", PER_TOKEN)
def test_on_policy_samples_are_left_alone(correction):
    assert weights(correction, [1.0] * 4, [1, 3]) == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("correction", [*PER_TOKEN, SecondMoment(), MaskMastered()])
def test_corrections_travel_to_the_ranks_by_pickle(correction):
    assert pickle.loads(pickle.dumps(correction)) == correction


def moved_by(steps):
    behaviour = np.full(len(steps), -3.0)
    return tokens_of(
        [0.0], [0], [len(steps)], behaviour, proximal_logprobs=behaviour + np.array(steps)
    )


def test_m2po_drops_the_furthest_tokens_by_hand():
    # squares 0.01, 1, 0, 0.09: means of the smallest 1, 2, 3, 4 are 0, .005, .033, .275
    keeps = SecondMoment(0.04).keeps(moved_by([0.1, -1.0, 0.0, 0.3]))
    assert keeps.tolist() == [True, False, True, True]


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20), st.floats(0.001, 2))
def test_m2po_keeps_as_many_tokens_as_the_bound_allows(steps, threshold):
    tokens = moved_by(steps)
    keeps = SecondMoment(threshold).keeps(tokens)
    squares = (tokens.proximal_logprobs.astype(float) - tokens.behaviour_logprobs) ** 2
    kept, dropped = np.sort(squares[keeps]), np.sort(squares[~keeps])
    if len(kept):
        assert kept.mean() <= threshold * (1 + 1e-9)
    if len(dropped):
        assert not len(kept) or kept[-1] <= dropped[0]
        assert np.append(kept, dropped[0]).mean() > threshold


def test_weights_multiply_in_whatever_precision_the_inputs_have():
    assert Truncate()(inputs_of([3.0], [1.0]), torch.tensor([1.0])).dtype == torch.float32
