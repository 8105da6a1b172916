"""A model small enough to run in milliseconds, and batches for it."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.configs.schema.model import ModelConfig
from paceline.configs.vocabulary import TrainBatch, TrainSample
from paceline.learner.model import write_initial_model

VOCAB_SIZE = 40

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
"""Weights larger than usual: with small ones attention hardly matters and tests could not fail."""


def model_config(model_type="qwen3", precision="float32", **settings):
    architecture = {"model_type": model_type, **SIZES, "tie_word_embeddings": True, **settings}
    if model_type == "qwen3":
        architecture.setdefault("head_dim", 8)
    return ModelConfig(
        architecture=architecture, tokenizer="characters", max_length=64, precision=precision
    )


def random_sample(generator, num_prompt, num_completion):
    length = num_prompt + num_completion
    trained = np.arange(length) >= num_prompt
    return TrainSample(
        token_ids=generator.integers(2, VOCAB_SIZE, length).astype(np.int32),
        loss_mask=trained,
        logprobs=np.where(trained, generator.uniform(-5, -2, length), 0).astype(np.float32),
        advantages=np.where(trained, generator.normal(), 0).astype(np.float32),
    )


def random_batch(seed=0, num_samples=12, temperature=1.0, longest=12):
    generator = np.random.default_rng(seed)
    samples = tuple(
        random_sample(generator, *generator.integers(1, longest, 2)) for _ in range(num_samples)
    )
    return TrainBatch(0, tuple(range(num_samples)), samples, temperature)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tied Qwen3 of 2 layers."""
    folder = str(tmp_path_factory.mktemp("model"))
    return write_initial_model(model_config(), VOCAB_SIZE, 1, seed=0, folder=folder)
