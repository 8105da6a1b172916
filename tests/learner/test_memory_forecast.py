"""What `paceline check` says a rank will hold is what a rank holds."""

from __future__ import annotations

import gc
from contextlib import ExitStack

import numpy as np
import pytest

from paceline.configs.forecast.activation_memory import LOGITS_PER_CHUNK, MIN_ROWS_PER_CHUNK
from paceline.configs.forecast.learner_memory import CHECKPOINT_COPY, learner_memory
from paceline.configs.forecast.model_shape import model_shape
from paceline.configs.load import load_config
from paceline.configs.schema import RunConfig
from paceline.configs.schema.learner import LearnerConfig
from paceline.configs.vocabulary import TrainBatch
from paceline.controller.bench.harness.resident_memory import (
    PAGES_AT_ONCE,
    environment,
    forget_peak,
    peak_bytes,
    resident_bytes,
)
from paceline.kernels import token_logprobs
from paceline.learner.model.model import write_initial_model
from tests.learner import ranks
from tests.learner.conftest import random_group, rank_process

VOCABULARY = 8192
ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""10 million parameters with tied embeddings, 13 without."""
SAMPLES_PER_ROW = 4
EXPERTS = {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 192,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
INTERLEAVED = {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2}
CHUNKS = {"activation_checkpointing": "chunks", "tokens_per_chunk": 128}


def zero(stage, **settings):
    return {"engine": "deepspeed", "deepspeed": {"stage": stage, **settings}}


def run_config(
    precision="float32",
    num_tokens=1024,
    vocabulary=VOCABULARY,
    tied=True,
    architecture=None,
    **learner,
):
    values = load_config("quickstart").model_dump()
    sizes = {"tie_word_embeddings": tied, "vocab_size": vocabulary}
    values["model"] |= {
        "architecture": ARCHITECTURE | (architecture or {}) | sizes,
        "tokenizer": "somebody/tokenizer",
        "max_length": num_tokens // SAMPLES_PER_ROW,
        "precision": precision,
    }
    values["learner"] |= {"tokens_per_microbatch": num_tokens, **learner}
    divided = LearnerConfig.model_validate(values["learner"])
    # a second row finds gradients; a pipeline is filled
    num_rows = 2 * divided.num_data_ranks * divided.parallel.pipeline
    values["loop"] |= {"groups_per_step": num_rows, "samples_per_group": SAMPLES_PER_ROW}
    return RunConfig.model_validate(values)


def full_rows(num_rows, num_tokens):
    """A batch of so many microbatches without padding."""
    generator = np.random.default_rng(0)
    length = num_tokens // SAMPLES_PER_ROW
    # the last token of a sequence is not read
    groups = [random_group(generator, 16, length - 15) for _ in range(num_rows * SAMPLES_PER_ROW)]
    return TrainBatch(0, tuple(groups))


@pytest.fixture(scope="module")
def processes():
    with environment(PAGES_AT_ONCE), ExitStack() as stack:
        yield [stack.enter_context(rank_process()) for _ in range(2)]


def measured_peak(config, folder, tiny_folder, weights_folder, rank, ports):
    """In a rank's process: bytes that it holds at most while it trains, less what was there when
    nothing was loaded but code."""
    settings, num_tokens = config.learner.model_dump(), config.learner.tokens_per_microbatch
    runs = [
        (tiny_folder, settings | {"parallel": {}}, 64),  # loads code
        (folder, settings, num_tokens),
    ]
    for port, (model_folder, learner, row_length) in zip(ports, runs, strict=True):
        gc.collect()
        base = resident_bytes()
        worker = ranks.make_worker(
            model_folder,
            weights_folder,
            rank,
            port=port,
            precision=config.model.precision,
            **learner,
        )
        batch = full_rows(config.loop.groups_per_step, row_length)
        forget_peak()
        worker.forward_backward(batch, ranks.LOSS)
        worker.optimizer_step(ranks.OPTIMIZER, 0, 1)
        peak = peak_bytes() - base
        worker.close()
        del worker
        ranks.forget_deepspeeds_past()
    return peak


def peaks_of_ranks(config, processes, tiny_folder, tmp_path):
    folder, num_ranks = str(tmp_path / "model"), config.learner.num_ranks
    vocabulary = config.model.architecture["vocab_size"]
    write_initial_model(config.model, vocabulary, 1, seed=0, folder=folder)
    ports = [ranks.free_port() if num_ranks > 1 else None for _ in range(2)]
    folders = folder, tiny_folder, tmp_path / "weights"
    submitted = [
        process.submit(measured_peak, config, *folders, rank, ports)
        for rank, process in enumerate(processes[:num_ranks])
    ]
    return [future.result(timeout=200) for future in submitted]


def forecast(config):
    shape = model_shape(config.model)
    assert shape is not None
    parts = learner_memory(config, shape).rank
    # nothing is saved here
    return sum(parts.values()) - parts[CHECKPOINT_COPY]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation_checkpointing": "layers", "vocabulary": 1024},
        {"num_tokens": 3072, "vocabulary": 1024, **CHUNKS},
        {"precision": "bfloat16", "tied": False},
        {"num_ranks": 2, **CHUNKS},
        {"num_ranks": 2},
        {"num_ranks": 2, "architecture": EXPERTS},
        {"num_ranks": 2, "parallel": {"tensor": 2}},
        {"num_ranks": 2, "parallel": {"sequence": 2}},
        {"num_ranks": 2, "parallel": {"pipeline": 2}},
        {"num_ranks": 2, "parallel": INTERLEAVED},
        {"num_ranks": 2, "precision": "bfloat16", **zero(1)},
        {"num_ranks": 2, **zero(3, offload_optimizer=True)},
    ],
    ids=str,
)
def test_the_forecast_is_within_15_percent_of_what_ranks_hold(
    settings, processes, model_folder, tmp_path
):
    config = run_config(**settings)
    peaks = peaks_of_ranks(config, processes, model_folder, tmp_path)
    assert forecast(config) == pytest.approx(max(peaks), rel=0.15)


def test_the_forecast_knows_the_chunks_of_logits():
    assert LOGITS_PER_CHUNK == token_logprobs.LOGITS_PER_CHUNK
    assert MIN_ROWS_PER_CHUNK == token_logprobs.MIN_ROWS_PER_CHUNK
