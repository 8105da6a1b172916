"""Weights, gradients and optimiser state in host memory train as they do beside the layers.

Without a GPU both are the same memory: what is tested is that FSDP's off-loading trains the same.
"""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from paceline.configs.schema.learner import LearnerConfig
from tests.learner import ranks
from tests.learner.conftest import random_batch
from tests.learner.test_worker import assert_same

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_training_off_loaded_follows_training_that_is_not(on_ranks, num_ranks):
    batches = [random_batch(seed=seed) for seed in range(3)]
    [(_, expected)] = on_ranks(1, ranks.train, batches)
    for _, found in on_ranks(num_ranks, ranks.train, batches, offload_optimizer=True):
        assert_same(found, expected, 1e-3)


def test_what_was_saved_off_loaded_resumes_anywhere(on_ranks, tmp_path):
    batches = [random_batch(seed=seed) for seed in range(4)]
    folder = str(tmp_path / "checkpoint")
    [(_, expected)] = on_ranks(1, ranks.train, batches)
    on_ranks(2, ranks.train_and_save, batches[:2], folder, offload_optimizer=True)
    [(version, (_, resumed))] = on_ranks(1, ranks.load_and_train, folder, batches[2:])
    assert version == 2
    assert_same(resumed, expected, 1e-3)


def test_deepspeed_has_a_setting_of_its_own():
    with pytest.raises(ValidationError, match=r"set learner\.deepspeed\.offload_optimizer"):
        LearnerConfig(engine="deepspeed", offload_optimizer=True)
