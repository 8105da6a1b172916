"""From a batch to its tokens, and batches that are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paceline.configs.errors import BatchError, NonFiniteError
from paceline.configs.vocabulary import TrainBatch, VersionSpan
from paceline.learner.batch.tokens import batch_tokens
from tests.learner.conftest import random_batch, random_sample

GENERATOR = np.random.default_rng(0)
SAMPLE = random_sample(GENERATOR, 2, 4)


def batch_of(*samples, group_ids=(7,), step=5):
    return TrainBatch(step, group_ids, samples)


def test_tokens_lie_sample_after_sample():
    batch = random_batch(num_samples=6)
    tokens = batch_tokens(batch)
    for index, sample in enumerate(batch.samples):
        inside = slice(tokens.starts[index], tokens.starts[index] + tokens.lengths[index])
        np.testing.assert_array_equal(
            tokens.behaviour_logprobs[inside], sample.logprobs[sample.loss_mask]
        )
        assert tokens.sums(np.ones(len(tokens.ages)))[index] == sample.loss_mask.sum()
    assert tokens.teacher_logprobs is None


def test_ages_count_from_the_first_trained_token_over_what_lies_between():
    spans = (VersionSpan(3, 0, 2), VersionSpan(4, 2, 4))
    assert batch_tokens(batch_of(replace(SAMPLE, versions=spans))).ages.tolist() == [2, 2, 1, 1]
    mask = SAMPLE.loss_mask.copy()
    mask[3] = False  # what the environment said
    scattered = replace(SAMPLE, versions=spans, loss_mask=mask)
    assert batch_tokens(batch_of(scattered)).ages.tolist() == [2, 1, 1]
    assert batch_tokens(batch_of(SAMPLE)).ages.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("batch", "error", "said"),
    [
        (batch_of(group_ids=()), BatchError, "step 5 has no samples"),
        (batch_of(SAMPLE, group_ids=(7, 8)), BatchError, "step 5: group 8 has no samples"),
        (
            batch_of(SAMPLE, replace(SAMPLE, loss_mask=np.zeros(6, dtype=bool))),
            BatchError,
            "step 5: sample 1 of group 7 has no trained token",
        ),
        (
            batch_of(replace(SAMPLE, loss_mask=np.ones(6, dtype=bool))),
            BatchError,
            "sample 0 of group 7 trains its first token",
        ),
        (
            batch_of(replace(SAMPLE, logprobs=SAMPLE.logprobs[:-1])),
            BatchError,
            r"sample 0 of group 7 has arrays of lengths \[6, 6, 5\]",
        ),
        (
            batch_of(replace(SAMPLE, reward=float("nan"))),
            NonFiniteError,
            "sample 0 of group 7 has reward nan",
        ),
        (
            batch_of(replace(SAMPLE, logprobs=np.full(6, -np.inf, dtype=np.float32))),
            NonFiniteError,
            "sample 0 of group 7 has log-probability -inf at token 2",
        ),
    ],
)
def test_what_cannot_be_trained_is_named(batch, error, said):
    with pytest.raises(error, match=said):
        batch_tokens(batch)
