"""A model small enough to run in milliseconds, and batches for it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import settings

from paceline.configs.schema.model import ModelConfig
from paceline.configs.vocabulary import TrainBatch, TrainSample
from paceline.learner.model import write_initial_model

# a busy machine is no failure
settings.register_profile("paceline", deadline=None)
settings.load_profile("paceline")

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
    prompt = generator.integers(2, VOCAB_SIZE, num_prompt)
    return continue_prompt(generator, prompt, num_completion)


def continue_prompt(generator, prompt, num_completion, group=0):
    length = len(prompt) + num_completion
    trained = np.arange(length) >= len(prompt)
    completion = generator.integers(2, VOCAB_SIZE, num_completion)
    return TrainSample(
        token_ids=np.concatenate([prompt, completion]).astype(np.int32),
        loss_mask=trained,
        logprobs=np.where(trained, generator.uniform(-5, -2, length), 0).astype(np.float32),
        reward=float(generator.normal()),
        group=group,
    )


def random_batch(seed=0, num_samples=12, temperature=1.0, longest=12):
    """Groups of 1 to 4 completions, of one token and more, of one prompt."""
    generator = np.random.default_rng(seed)
    samples = []
    for group in itertools.count():
        prompt = generator.integers(2, VOCAB_SIZE, generator.integers(1, longest))
        samples += [
            continue_prompt(generator, prompt, generator.integers(1, longest), group)
            for _ in range(generator.integers(1, 5))
        ]
        if len(samples) >= num_samples:
            break
    return TrainBatch(0, tuple(range(group + 1)), tuple(samples[:num_samples]), temperature)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tied Qwen3 of 2 layers."""
    folder = str(tmp_path_factory.mktemp("model"))
    return write_initial_model(model_config(), VOCAB_SIZE, 1, seed=0, folder=folder)
