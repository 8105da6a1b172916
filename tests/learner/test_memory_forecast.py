"""What `paceline check` says a rank will hold is what a rank holds."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest

from paceline.configs.learner_memory import (
    CHECKPOINT_COPY,
    LOGITS_PER_CHUNK,
    MIN_ROWS_PER_CHUNK,
    learner_rank,
)
from paceline.configs.load import load_config
from paceline.configs.model_shape import model_shape
from paceline.configs.schema import RunConfig
from paceline.configs.vocabulary import TrainBatch
from paceline.controller.bench.resident_memory import (
    PAGES_AT_ONCE,
    environment,
    forget_peak,
    peak_bytes,
    resident_bytes,
)
from paceline.kernels import token_logprobs
from paceline.learner.model import load_policy, write_initial_model
from tests.learner import ranks
from tests.learner.conftest import random_sample, rank_process
from tests.learner.test_attention import logits, packed_row, random_sequences

VOCABULARY = 8192
ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""14 million parameters with tied embeddings, 17 without."""
CHUNKS = {"activation_checkpointing": "chunks", "tokens_per_chunk": 128}


def run_config(precision="float32", num_tokens=1024, vocabulary=VOCABULARY, tied=True, **learner):
    values = load_config("quickstart").model_dump()
    values["model"] |= {
        "architecture": ARCHITECTURE | {"tie_word_embeddings": tied, "vocab_size": vocabulary},
        "tokenizer": "somebody/tokenizer",
        "max_length": num_tokens,
        "precision": precision,
    }
    values["learner"] |= {"tokens_per_microbatch": num_tokens, **learner}
    return RunConfig.model_validate(values)


def full_rows(num_rows, num_tokens):
    """A batch of so many microbatches without padding, of four sequences each."""
    generator = np.random.default_rng(0)
    # the last token of a sequence is not read
    samples = [random_sample(generator, 16, num_tokens // 4 - 15) for _ in range(4 * num_rows)]
    return TrainBatch(0, (0,), tuple(samples))


def measured_peak(config, folder, tiny_folder, weights_folder, rank, port):
    """In a rank's process: bytes that it holds at most while it trains, less what was there when
    nothing was loaded but code."""
    warm_up(tiny_folder)
    base = resident_bytes()
    worker = ranks.make_worker(
        folder,
        weights_folder,
        rank,
        port=port,
        precision=config.model.precision,
        **config.learner.model_dump(),
    )
    batch = full_rows(2 * config.learner.num_ranks, config.learner.tokens_per_microbatch)
    forget_peak()
    worker.forward_backward(batch, ranks.LOSS)
    worker.optimizer_step(1, ranks.OPTIMIZER, 0, 1)
    peak = peak_bytes() - base
    worker.close()
    return peak


def warm_up(folder):
    """Load what transformers loads with its first model."""
    (values,) = load_policy(folder)(packed_row(random_sequences([4])), logits)
    values.sum().backward()


def peaks_of_ranks(config, tiny_folder, tmp_path):
    folder, num_ranks = str(tmp_path / "model"), config.learner.num_ranks
    vocabulary = config.model.architecture["vocab_size"]
    write_initial_model(config.model, vocabulary, 1, seed=0, folder=folder)
    port = ranks.free_port() if num_ranks > 1 else None
    folders = folder, tiny_folder, tmp_path / "weights"
    with environment(PAGES_AT_ONCE), ExitStack() as stack:
        processes = [stack.enter_context(rank_process()) for _ in range(num_ranks)]
        submitted = [
            process.submit(measured_peak, config, *folders, rank, port)
            for rank, process in enumerate(processes)
        ]
        return [future.result(timeout=200) for future in submitted]


def forecast(config):
    shape = model_shape(config.model)
    assert shape is not None
    # nothing is saved here
    return sum(size for part, size in learner_rank(config, shape) if part != CHECKPOINT_COPY)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation_checkpointing": "layers", "vocabulary": 1024},
        {"num_tokens": 3072, "vocabulary": 1024, **CHUNKS},
        {"precision": "bfloat16", "tied": False},
        {"num_ranks": 2},
        {"num_ranks": 2, **CHUNKS},
    ],
    ids=str,
)
def test_the_forecast_is_within_15_percent_of_what_ranks_hold(settings, model_folder, tmp_path):
    config = run_config(**settings)
    for peak in peaks_of_ranks(config, model_folder, tmp_path):
        assert forecast(config) == pytest.approx(peak, rel=0.15)


def test_the_forecast_knows_the_chunks_of_logits():
    assert LOGITS_PER_CHUNK == token_logprobs.LOGITS_PER_CHUNK
    assert MIN_ROWS_PER_CHUNK == token_logprobs.MIN_ROWS_PER_CHUNK
