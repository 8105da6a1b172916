"""Matrices and vocabulary divided over tensor ranks change no result, and what cannot be divided is
refused by name. Every law: `test_conformance.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from paceline.configs.errors import ModelError
from paceline.kernels.token_logprobs import token_logprobs_reference
from paceline.learner.engines.parallel.tensor import require_divisible
from paceline.learner.model.model import write_initial_model
from tests.learner import ranks
from tests.learner.conftest import VOCAB_SIZE, model_config, random_batch
from tests.learner.engines.comparisons import relative_error
from tests.learner.test_worker import assert_same

TENSOR = {"tensor": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "model_type", "settings"),
    [
        (2, "qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
        (4, "qwen3", {"num_key_value_heads": 4}),
        (2, "qwen2", {"tie_word_embeddings": True}),
        (2, "llama", {"tie_word_embeddings": False}),
        (2, "mistral", {"tie_word_embeddings": True}),
    ],
)
def test_every_family_has_the_gradients_of_one_process(
    on_ranks, tmp_path, num_ranks, model_type, settings
):
    folder = str(tmp_path / "model")
    write_initial_model(model_config(model_type, **settings), VOCAB_SIZE, 1, 0, folder)
    batch = random_batch(num_samples=8, temperature=0.9)
    [(report, expected)] = on_ranks(1, ranks.gradients, batch, model_folder=folder)
    for found in on_ranks(
        num_ranks, ranks.gradients, batch, model_folder=folder, parallel={"tensor": num_ranks}
    ):
        assert found[0].metrics == pytest.approx(report.metrics, rel=1e-5, abs=1e-6)
        assert_same(found[1], expected, 1e-5)


@pytest.mark.slow
def test_bfloat16_rounds_no_more_than_one_rank_does(on_ranks):
    batch = random_batch()
    [(_, exact)] = on_ranks(1, ranks.gradients, batch)
    [(_, single)] = on_ranks(1, ranks.gradients, batch, precision="bfloat16")
    [(_, found), _] = on_ranks(2, ranks.gradients, batch, precision="bfloat16", parallel=TENSOR)
    for name, gradient in exact.items():
        assert (
            relative_error(found[name], gradient)
            < 1.5 * relative_error(single[name], gradient) + 0.01
        ), name


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_logprobs_and_entropy_of_a_divided_vocabulary_are_those_of_the_whole(on_ranks, num_rows):
    """Values and gradients, in chunks; some logits so large that one rank has all probability."""
    generator = torch.Generator().manual_seed(0)
    hidden = (
        torch.randn(num_rows, 16, generator=generator)
        * torch.logspace(-1, 1, num_rows or 1)[:num_rows, None]
    )
    weight = torch.randn(VOCAB_SIZE, 16, generator=generator)
    targets = torch.randint(0, VOCAB_SIZE, (num_rows,), generator=generator)
    scales = torch.randn(2, num_rows, generator=generator)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    outputs = token_logprobs_reference(hidden, weight, targets, 0.7)
    expected = [*outputs, *torch.autograd.grad(outputs, inputs, list(scales))]
    arguments = (hidden.detach(), weight.detach(), targets, scales, 0.7)
    found = on_ranks(2, ranks.divided_logprobs, *arguments, parallel=TENSOR)
    for rank, (*whole, rows) in enumerate(found):
        wanted = [tensor.detach() for tensor in expected]
        own = wanted[-1].chunk(2)[rank]
        for mine, theirs in zip([*whole, rows], [*wanted[:-1], own], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def refusal(model_type, num_ranks, **settings):
    sizes = {**model_config(model_type, **settings).architecture, "vocab_size": VOCAB_SIZE}
    with pytest.raises(ModelError) as caught:
        require_divisible(AutoConfig.for_model(**sizes), num_ranks)
    return str(caught.value)


def test_an_architecture_without_a_plan_is_named_with_what_it_would_need():
    found = refusal("olmo2", 2)
    assert "does not know olmo2" in found and "needs a plan in" in found


@pytest.mark.parametrize(
    ("num_ranks", "settings", "words"),
    [
        (3, {}, "4 attention heads"),
        (4, {}, "2 key-value heads"),
        (4, {"num_key_value_heads": 4, "intermediate_size": 62}, "62 intermediate features"),
    ],
)
def test_ranks_that_do_not_divide_the_model_are_refused(num_ranks, settings, words):
    assert words in refusal("qwen3", num_ranks, **settings)
