"""What ranks found beside what one process found."""

from __future__ import annotations

import numpy as np
import pytest

from tests.learner import ranks
from tests.learner.test_worker import assert_same


def assert_same_metrics(found, expected, **tolerance):
    """Those of every rank, by batch or step."""
    for mine in found:
        for one, other in zip(mine, expected, strict=True):
            assert ranks.of_training(one) == pytest.approx(ranks.of_training(other), **tolerance)


def assert_same_logprobs(found, expected):
    """Those of every rank, by sample."""
    for mine in found:
        for one, other in zip(mine, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


def assert_same_gradients(found, expected):
    """What every rank's `ranks.gradients_and_logprobs` returned."""
    report, gradients, logprobs = expected
    metrics = [[mine.metrics] for mine, *_ in found]
    assert_same_metrics(metrics, [report.metrics], rel=1e-5, abs=1e-6)
    assert_same(ranks.merged(theirs for _, theirs, *_ in found), gradients, 1e-5)
    assert_same_logprobs([theirs for *_, theirs in found], logprobs)


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
