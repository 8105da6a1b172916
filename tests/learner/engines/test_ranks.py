"""Two FSDP ranks: idle ones, their precision, and one that waits in vain. Every law:
`test_conformance.py`."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.configs.errors import ClusterError
from paceline.configs.vocabulary import TrainBatch
from paceline.weights_sync.shared_memory import read_weights
from tests.learner import ranks
from tests.learner.conftest import random_batch, random_group, rank_process
from tests.learner.engines.comparisons import relative_error
from tests.learner.test_worker import assert_same

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_rank_without_samples_keeps_step_and_adds_nothing(on_ranks, num_samples):
    """One sample for two ranks; or a long one in two microbatches' worth of short ones."""
    generator = np.random.default_rng(0)
    shapes = [(10, 50), (10, 40), (10, 40)][:num_samples]
    batch = TrainBatch(0, tuple(random_group(generator, *shape) for shape in shapes))
    [(_, expected)] = on_ranks(1, ranks.gradients, batch)
    for report, found in on_ranks(2, ranks.gradients, batch):
        assert report.num_padding_tokens == 1
        assert_same(found, expected, 1e-5)


def test_bfloat16_runs_the_same_arithmetic_on_one_and_two_ranks(on_ranks):
    batch = random_batch()
    [(exact, exact_gradients)] = on_ranks(1, ranks.gradients, batch)
    [(one, found)] = on_ranks(1, ranks.gradients, batch, precision="bfloat16")
    [(two, found_on_two), _] = on_ranks(2, ranks.gradients, batch, precision="bfloat16")
    assert one.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.05)
    assert one.metrics != exact.metrics
    assert two.metrics["entropy"] == pytest.approx(one.metrics["entropy"], rel=1e-3)
    for name, gradient in exact_gradients.items():
        assert found[name].dtype == np.float32
        assert relative_error(found[name], gradient) < 0.1, name
        assert relative_error(found_on_two[name], found[name]) < 0.02, name


def test_bfloat16_trains_float32_masters_and_publishes_bfloat16(on_ranks, tmp_path):
    folder = tmp_path / "model"
    [(masters, handle)] = on_ranks(
        1, ranks.train_and_publish, [random_batch()], str(folder), precision="bfloat16"
    )
    assert {values.dtype for values in masters.values()} == {np.dtype(np.float32)}
    published = dict(read_weights(handle))
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert exported.dtype == torch.bfloat16
    for name, parameter in exported.named_parameters():
        rounded = torch.from_numpy(masters[name]).bfloat16()
        assert torch.equal(published[name], rounded)
        assert torch.equal(parameter, rounded)


def test_a_rank_that_waits_in_vain_names_the_rendezvous(model_folder, tmp_path):
    """In a process of its own: one that failed to meet the others counts its groups differently."""
    port = ranks.free_port()
    with rank_process("forkserver") as alone, pytest.raises(ClusterError) as error:
        alone.submit(
            ranks.make_worker,
            model_folder,
            tmp_path / "weights",
            num_ranks=2,
            port=port,
            collective_timeout_seconds=1,
        ).result(timeout=120)
    assert re.search(rf"rank 0 of 2 did not meet .*:{port} within 1 s", str(error.value))
