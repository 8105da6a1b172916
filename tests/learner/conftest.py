"""A model small enough to run in milliseconds, and batches for it."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paceline.configs.schema.model import ModelConfig
from paceline.configs.vocabulary import Completion, Group, Prompt, Sample, TrainBatch
from paceline.learner.batch.sequences import token_sequences
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


def random_group(generator, num_prompt, *completions, group_id=0):
    """A prompt and completions of so many tokens."""
    prompt = generator.integers(2, VOCAB_SIZE, num_prompt)
    samples = [random_sample(generator, num_prompt, length) for length in completions]
    return group_of(prompt, samples, group_id)


def random_sample(generator, num_prompt, num_completion):
    tokens = generator.integers(2, VOCAB_SIZE, num_completion)
    logprobs = generator.uniform(-5, -2, num_prompt + num_completion)[num_prompt:]
    completion = Completion(tokens.astype(np.int32), logprobs.astype(np.float32), (), "stop")
    return Sample(completion, reward=float(generator.normal()))


def group_of(prompt, samples, group_id=0):
    return Group(group_id, Prompt("", "", tuple(map(int, prompt))), tuple(samples))


def random_batch(seed=0, num_samples=12, temperature=1.0, longest=12):
    """Groups of 1 to 4 completions, of one token and more, of one prompt."""
    generator = np.random.default_rng(seed)
    groups = []
    while num_samples > 0:
        prompt = generator.integers(2, VOCAB_SIZE, generator.integers(1, longest))
        samples = [
            random_sample(generator, len(prompt), generator.integers(1, longest))
            for _ in range(generator.integers(1, 5))
        ]
        groups.append(group_of(prompt, samples[:num_samples], len(groups)))
        num_samples -= len(samples)
    return TrainBatch(0, tuple(groups), temperature)


def with_samples(batch, samples):
    """The batch with others in place of its samples, in their order."""
    remaining = iter(samples)
    groups = [
        replace(group, samples=tuple(itertools.islice(remaining, len(group.samples))))
        for group in batch.groups
    ]
    return replace(batch, groups=tuple(groups))


def with_logprobs(batch, logprobs):
    """The batch as sampled with these log-probabilities of each sample, float32 [C]."""
    pairs = zip(batch.samples, logprobs, strict=True)
    return with_samples(batch, (with_completion(s, logprobs=found) for s, found in pairs))


def with_completion(sample, **changes):
    return replace(sample, completion=replace(sample.completion, **changes))


def sequences_of(batch):
    return token_sequences(batch.groups)


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
