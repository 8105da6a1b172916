"""From a batch to its tokens, and batches that are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paceline.configs.errors import BatchError, NonFiniteError
from paceline.configs.vocabulary import Group, Prompt, TrainBatch, VersionSpan
from paceline.learner.batch.tokens import batch_tokens
from tests.learner.conftest import group_of, random_batch, random_sample, with_completion

GENERATOR = np.random.default_rng(0)
SAMPLE = random_sample(GENERATOR, 2, 4)


def batch_of(*groups, step=5):
    """Groups 7, 8 and so on, of these samples."""
    prompt = Prompt("", "", (3, 4))
    return TrainBatch(step, tuple(Group(7 + i, prompt, group) for i, group in enumerate(groups)))


def test_tokens_lie_sample_after_sample():
    batch = random_batch(num_samples=6)
    tokens = batch_tokens(batch)
    for index, sample in enumerate(batch.samples):
        inside = slice(tokens.starts[index], tokens.starts[index] + tokens.lengths[index])
        np.testing.assert_array_equal(tokens.behaviour_logprobs[inside], sample.completion.logprobs)
        assert tokens.sums(np.ones(len(tokens.ages)))[index] == sample.num_tokens
    groups = [index for index, group in enumerate(batch.groups) for _ in group.samples]
    assert tokens.groups.tolist() == groups
    assert tokens.name_of(groups.index(1)) == "sample 0 of group 1"
    assert tokens.teacher_logprobs is None


def test_ages_are_of_the_version_that_sampled_each_token():
    spans = (VersionSpan(3, 0, 2), VersionSpan(4, 2, 4))
    sampled = with_completion(SAMPLE, versions=spans)
    assert batch_tokens(batch_of((sampled,))).ages.tolist() == [2, 2, 1, 1]
    assert batch_tokens(batch_of((SAMPLE,))).ages.tolist() == [0, 0, 0, 0]


EMPTY = random_sample(GENERATOR, 2, 0)


@pytest.mark.parametrize(
    ("batch", "error", "said"),
    [
        (batch_of(), BatchError, "step 5 has no samples"),
        (batch_of((SAMPLE,), ()), BatchError, "step 5: group 8 has no samples"),
        (
            batch_of((SAMPLE, EMPTY)),
            BatchError,
            "step 5: sample 1 of group 7 has no trained token",
        ),
        (TrainBatch(5, (group_of((), [SAMPLE], 7),)), BatchError, "group 7 has an empty prompt"),
        (
            batch_of((with_completion(SAMPLE, logprobs=np.zeros(3, np.float32)),)),
            BatchError,
            r"sample 0 of group 7 has arrays of lengths \[4, 3\]",
        ),
        (
            batch_of((replace(SAMPLE, teacher_logprobs=np.zeros(6, np.float32)),)),
            BatchError,
            r"sample 0 of group 7 has arrays of lengths \[4, 4, 6\]",
        ),
        (
            batch_of((with_completion(SAMPLE, routed_experts=np.zeros((4, 2, 1), np.int16)),)),
            BatchError,
            r"sample 0 of group 7 has arrays of lengths \[4, 4, 2\]",
        ),
        (
            batch_of((replace(SAMPLE, reward=float("nan")),)),
            NonFiniteError,
            "sample 0 of group 7 has reward nan",
        ),
        (
            batch_of((with_completion(SAMPLE, logprobs=np.array([-1, -1, -np.inf, -1])),)),
            NonFiniteError,
            "sample 0 of group 7 has log-probability -inf at token 2 of its completion",
        ),
    ],
)
def test_what_cannot_be_trained_is_named(batch, error, said):
    with pytest.raises(error, match=said):
        batch_tokens(batch)
