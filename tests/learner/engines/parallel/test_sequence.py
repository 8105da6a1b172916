"""Rows divided over sequence ranks: who has what, and what is refused. Every law:
`test_conformance.py`."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoConfig

from paceline.configs.errors import ModelError
from paceline.configs.vocabulary import TrainBatch
from paceline.learner.engines.parallel.sequence import sequence_ranks
from paceline.learner.model.model import write_initial_model
from tests.learner import ranks
from tests.learner.conftest import VOCAB_SIZE, model_config, random_batch, random_group
from tests.learner.test_worker import assert_same


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "model_type", "settings"),
    [
        (4, "qwen3", {}),  # each of two key-value heads on two ranks
        (2, "qwen2", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}),
        (2, "olmo2", {"tie_word_embeddings": False}),
    ],
)
def test_heads_that_ranks_share_have_the_gradients_of_one_process(
    on_ranks, tmp_path, num_ranks, model_type, settings
):
    folder = str(tmp_path / "model")
    write_initial_model(model_config(model_type, **settings), VOCAB_SIZE, 1, 0, folder)
    batch = random_batch(num_samples=8)
    [(report, expected)] = on_ranks(1, ranks.gradients, batch, model_folder=folder)
    for found in on_ranks(
        num_ranks, ranks.gradients, batch, model_folder=folder, parallel={"sequence": num_ranks}
    ):
        assert found[0].metrics["loss"] == pytest.approx(report.metrics["loss"], rel=1e-5)
        assert_same(found[1], expected, 1e-5)


@pytest.mark.slow
def test_a_rank_whose_tokens_predict_nothing_changes_no_gradient(on_ranks):
    """The second half of the row is trained on, the first is a prompt; layers computed twice."""
    batch = TrainBatch(0, (random_group(np.random.default_rng(0), 40, 9),))
    [(_, expected)] = on_ranks(1, ranks.gradients, batch)
    settings = {"parallel": {"sequence": 2}, "activation_checkpointing": "layers"}
    for report, found in on_ranks(2, ranks.gradients, batch, **settings):
        assert report.num_padding_tokens == 0
        assert_same(found, expected, 1e-5)


class Mesh:
    """As much of a `RankMesh` as is looked at before a refusal."""

    def __init__(self, **parallel):
        self.sizes = {"tensor": 1, "sequence": 1} | parallel


@pytest.mark.parametrize(
    ("parallel", "words"),
    [({"sequence": 3}, r"sequence \(3\) .* 4 attention"), ({"sequence": 4, "tensor": 2}, "4 / 2")],
)
def test_ranks_that_do_not_divide_the_heads_are_refused(parallel, words):
    config = AutoConfig.for_model(**model_config().architecture)
    with pytest.raises(ModelError, match=words):
        sequence_ranks(config, Mesh(**parallel))
