"""What drafts are worth is learned from those verified, by what the drafter knew of each token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.spec.budget.confidence import DraftConfidence
from paceline.spec.history import Drafts

LONGEST = 6


def drafts_of(random: np.random.Generator, num_rows: int) -> Drafts:
    lengths = random.integers(0, LONGEST + 1, num_rows)
    inside = np.arange(LONGEST) < lengths[:, None]
    return Drafts(
        tokens=np.where(inside, 1, -1).astype(np.int32),
        probabilities=np.where(inside, random.random((num_rows, LONGEST)), 0).astype(np.float32),
        num_tokens=lengths.astype(np.int32),
        matches=random.integers(1, 33, num_rows).astype(np.int32),
        generations=np.zeros(num_rows, dtype=np.int64),
    )


@given(st.integers(0, 100), st.integers(1, 20), st.integers(0, 5))
def test_survival_is_a_probability_that_never_rises_and_ends_with_the_draft(
    seed: int, num_rows: int, num_rounds: int
) -> None:
    random = np.random.default_rng(seed)
    confidence = DraftConfidence()
    for _ in range(num_rounds):
        drafts = drafts_of(random, num_rows)
        drafted = random.integers(0, drafts.num_tokens + 1)
        accepted = random.integers(0, drafted + 1)
        confidence.observe(drafts, np.arange(num_rows), drafted, accepted)
    drafts = drafts_of(random, num_rows)
    survival = confidence.survival(drafts)
    assert ((survival >= 0) & (survival <= 1)).all()
    assert (np.diff(survival, axis=1) <= 0).all()
    offered = np.arange(LONGEST) < drafts.num_tokens[:, None]
    assert ((survival > 0) == offered).all()


@pytest.mark.parametrize("trust", [0.3, 1.0])
def test_survival_is_recovered_whatever_the_drafter_believes(trust: float) -> None:
    """Tokens hold with ``trust`` times what the drafter estimates."""
    random = np.random.default_rng(1)
    confidence = DraftConfidence()
    for _ in range(3000):
        drafts = drafts_of(random, 8)
        drafted = random.integers(0, drafts.num_tokens + 1)
        holds = random.random((8, LONGEST)) < trust * drafts.probabilities
        accepted = np.minimum(np.cumprod(holds, axis=1).sum(axis=1), drafted)
        confidence.observe(drafts, np.arange(8), drafted, accepted)
    drafts = drafts_of(random, 4000)
    expected = np.cumprod(trust * drafts.probabilities.astype(float), axis=1)
    assert confidence.survival(drafts).mean(axis=0) == pytest.approx(
        expected.mean(axis=0), abs=0.02
    )
    assert np.abs(confidence.survival(drafts) - expected).mean() < 0.03


def test_tokens_behind_one_that_did_not_hold_say_nothing() -> None:
    random = np.random.default_rng(2)
    drafts = drafts_of(random, 1)
    while drafts.num_tokens[0] < LONGEST:
        drafts = drafts_of(random, 1)
    confidence = DraftConfidence()
    before = confidence.rates
    confidence.observe(drafts, np.array([0]), np.array([LONGEST]), np.array([0]))
    assert np.count_nonzero(confidence.rates != before) == 1


def test_what_is_aged_away_leaves_the_prior() -> None:
    random = np.random.default_rng(3)
    confidence = DraftConfidence()
    before = confidence.rates
    drafts = drafts_of(random, 64)
    confidence.observe(drafts, np.arange(64), drafts.num_tokens.astype(np.int64), np.zeros(64, int))
    assert not np.allclose(confidence.rates, before)
    confidence.age(1e-9)
    assert np.allclose(confidence.rates, before)
