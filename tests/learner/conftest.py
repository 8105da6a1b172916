"""A model small enough to run in milliseconds, and batches for it."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from paceline.configs.schema.model import ModelConfig
from paceline.configs.vocabulary import TrainBatch, TrainSample
from paceline.learner.model.model import write_initial_model

REPOSITORY = str(Path(__file__).parents[2])
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


@pytest.fixture(scope="package")
def rank_processes():
    """Processes for all learner tests: importing takes seconds."""
    with RankProcesses() as processes:
        yield processes


class RankProcesses(ExitStack):
    """Processes that are started when first needed, and again when one has died.

    A process keeps its rank, as in a run: torch caches shard offsets by mesh and forgets to key
    them by rank.
    """

    def __init__(self):
        super().__init__()
        self._running = []

    def at_least(self, number):
        """``number`` of them, by rank."""
        from tests.learner import ranks  # which imports this file

        missing = range(len(self._running), number)
        new = [self.enter_context(rank_process("forkserver")) for _ in missing]
        # else the first ones ready would wait for the others at the rendezvous
        concurrent.futures.wait([process.submit(ranks.be_imported) for process in new])
        self._running.extend(new)
        return self._running[:number]

    def forget(self):
        """Start anew: a test whose process died fails, those after it do not."""
        self._running.clear()


@contextmanager
def rank_process(start="spawn"):
    """A process that can import what the tests can.

    Spawned, it imports it all, with the environment of this moment, which takes seconds; of the
    "forkserver" it has most of that already, and ends as fast.
    """
    context = multiprocessing.get_context(start)
    context.set_forkserver_preload(["hypothesis", "pytest", "paceline.learner.worker"])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY)
        patch.setenv("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(1, context) as process:
            yield process


@pytest.fixture
def on_ranks(rank_processes, model_folder, tmp_path):
    """``on_ranks(2, program, *arguments)``: every rank's result of a program in ``ranks.py``.

    Keyword arguments are the learner's settings, or another ``model_folder``.
    """

    def run(num_ranks, program, *arguments, **settings):
        folders = {"model_folder": model_folder, "weights_folder": tmp_path / "weights"}
        return run_ranks(rank_processes, num_ranks, program, *arguments, **folders | settings)

    return run


@pytest.fixture(scope="package")
def one_process(rank_processes, model_folder, tmp_path_factory):
    """``one_process(program, *arguments)``: what one rank returns, computed once for all tests."""
    folders = {"model_folder": model_folder, "weights_folder": tmp_path_factory.mktemp("one")}
    results = {}

    def result(program, *arguments, **settings):
        key = pickle.dumps((program, arguments, settings))
        if key not in results:
            [results[key]] = run_ranks(rank_processes, 1, program, *arguments, **folders | settings)
        return results[key]

    return result


def run_ranks(rank_processes, num_ranks, program, *arguments, **settings):
    """Every rank's result of a program; see ``on_ranks``."""
    from tests.learner import ranks  # which imports this file

    shared = {
        "num_ranks": num_ranks,
        "port": ranks.free_port() if num_ranks > 1 else None,
        **settings,
    }
    processes = rank_processes.at_least(num_ranks)
    try:
        submitted = [
            process.submit(ranks.run_rank, program, arguments, shared | {"rank": rank})
            for rank, process in enumerate(processes)
        ]
        return [future.result(timeout=120) for future in submitted]
    except BrokenProcessPool:
        rank_processes.forget()
        raise
