"""A tiny model, and one real vLLM engine for all tests of this folder."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paceline.configs.schema.model import ModelConfig
from paceline.configs.schema.rollout import RolloutConfig
from paceline.configs.vocabulary import Completion, RolloutRequest, SamplingParameters
from paceline.learner.checkpoints.shards import layout_of, local_shards
from paceline.learner.model.model import write_initial_model
from paceline.weights_sync.shared_memory import SharedMemoryPublisher

MAX_LENGTH = 64
STOP = 1


def tiny_model_config(max_length: int = MAX_LENGTH, **changes) -> ModelConfig:
    architecture = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "tie_word_embeddings": True,
    } | changes
    return ModelConfig(architecture=architecture, tokenizer="characters", max_length=max_length)


@dataclass
class Reference:
    """The Hugging Face model the engine must agree with, and the way its weights are published."""

    model: torch.nn.Module
    publisher: SharedMemoryPublisher

    def publish(self, version: int):
        self.publisher.write(version, local_shards(self.model))
        return self.publisher.commit(version)

    def perturb(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)

    @torch.no_grad()
    def logprobs(self, prompt, token_ids, temperature=1.0) -> torch.Tensor:
        """Log-probabilities [C, V] at the positions of a completion."""
        ids = torch.tensor([[*prompt, *map(int, token_ids)]])
        logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
        return (logits / (temperature or 1.0)).log_softmax(-1)


def build_reference(folder: str, shared: Path) -> Reference:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Reference(model, SharedMemoryPublisher(str(shared), layout_of(model, "float32")))


def build_engine(
    folder: str,
    max_num_seqs: int = 32,
    policy: str = "recompute",
    max_length: int = MAX_LENGTH,
    speculative_config: dict[str, Any] | None = None,
    **settings,
):
    from vllm.v1.engine import core

    from paceline.rollout.vllm_engine import VLLMEngine

    # An engine that ends, or cannot be built, would take the process's parallel groups with it, and
    # the tests have several in one process.
    core.cleanup_dist_env_and_memory = lambda: None
    return VLLMEngine(
        folder,
        RolloutConfig(
            **{"max_num_seqs": max_num_seqs, "kv_cache_mb": 16, "on_weight_update": policy}
            | settings
        ),
        max_length=max_length,
        dtype="float32",
        seed=0,
        speculative_config=speculative_config,
    )


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def engine_and_reference(request, tmp_path_factory):
    """An engine that was loaded with OTHER weights than the reference holds now."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_model_config(tie_word_embeddings=request.param)
    write_initial_model(config, 128, STOP, seed=0, folder=str(folder))
    engine = build_engine(str(folder))
    return engine, build_reference(str(folder), tmp_path_factory.mktemp("weights"))


class VersionedReference:
    """The reference model under the weights of any version, and engines brought to one."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._initial = [p.detach().clone() for p in reference.model.parameters()]

    def serve(self, engine, version: int):
        """What the engine gives back when it is updated to a version."""
        self.load(version)
        return engine.update_weights(self._reference.publish(version))

    def load(self, version: int) -> torch.nn.Module:
        """The model with a version's weights."""
        for parameter, values in zip(
            self._reference.model.parameters(), self._initial, strict=True
        ):
            parameter.data.copy_(values)
        self._reference.perturb(seed=1000 + version)
        return self._reference.model

    def chosen(self, version: int, request: RolloutRequest, token_ids) -> np.ndarray:
        """Log-probabilities [C] of a completion under one version from its first token on."""
        self.load(version)
        prompt, temperature = request.prompt_token_ids, request.sampling.temperature
        logprobs = self._reference.logprobs(prompt, token_ids, temperature)
        return logprobs.gather(1, torch.tensor(token_ids).long()[:, None])[:, 0].numpy()

    def error(self, request: RolloutRequest, completion: Completion) -> float:
        """Largest distance of a token's log-probability from that of its span's version."""
        assert_spans_tile(completion)
        errors = [
            self.chosen(span.version, request, completion.token_ids)[span.start : span.end]
            - completion.logprobs[span.start : span.end]
            for span in completion.versions
        ]
        return spread(np.concatenate(errors)) if errors else 0.0


def assert_spans_tile(completion: Completion) -> None:
    """Spans cover every token once, in order, and no two neighbours are of one version."""
    ends = [0, *(span.end for span in completion.versions)]
    assert [span.start for span in completion.versions] == ends[:-1]
    assert ends[-1] == len(completion.token_ids) == len(completion.logprobs)
    assert all(span.start < span.end for span in completion.versions)
    versions = [span.version for span in completion.versions]
    assert all(left != right for left, right in itertools.pairwise(versions))


LONG = 384


@dataclass
class Fleet:
    """An engine for every policy of a weight update, all of one tiny model."""

    recompute: Any
    keep: Any
    abort: Any
    reference: VersionedReference


@pytest.fixture(scope="session")
def fleet(tmp_path_factory) -> Fleet:
    folder = str(tmp_path_factory.mktemp("fleet-model"))
    write_initial_model(tiny_model_config(LONG), 128, STOP, seed=0, folder=folder)
    engines = {
        policy: build_engine(folder, max_num_seqs=8, policy=policy, max_length=LONG)
        for policy in ("recompute", "keep", "abort")
    }
    reference = build_reference(folder, tmp_path_factory.mktemp("fleet-weights"))
    return Fleet(reference=VersionedReference(reference), **engines)


ALWAYS = {"budget": "none", "max_tokens": 4}
SCRIPTED = {
    "method": "custom_class",
    "model": "tests.rollout.speculation.drafters.ScriptedDrafter",
    "num_speculative_tokens": 4,
}
PEAKED = {
    "undrafted": {},
    "drafting": {"drafting": ALWAYS},
    "scripted": {"speculative_config": SCRIPTED},
    "coupled_undrafted": {"coupled_sampling": True},
    "coupled_drafting": {"coupled_sampling": True, "drafting": ALWAYS},
    "coupled_scripted": {"coupled_sampling": True, "speculative_config": SCRIPTED},
}
"""Engines that sample coupled or as vLLM does, drafted for by us, by a script, or not."""


class PeakedEngines:
    """Engines of one model whose logits are far apart, by their names in `PEAKED`; each is built
    when it is first asked for, and all serve one version."""

    def __init__(self, folder: str, reference: VersionedReference) -> None:
        self.reference = reference
        self._folder = folder
        self._built: dict[str, Any] = {}
        self._version = 0

    def __getattr__(self, name: str):
        if name not in PEAKED:
            raise AttributeError(name)
        if name not in self._built:
            engine = build_engine(self._folder, 64, max_length=LONG, **PEAKED[name])
            self.reference.serve(engine, self._version)
            self._built[name] = engine
        return self._built[name]

    def serve(self, version: int) -> None:
        self._version = version
        for engine in self._built.values():
            self.reference.serve(engine, version)


@pytest.fixture(scope="session")
def engines(tmp_path_factory) -> PeakedEngines:
    folder = str(tmp_path_factory.mktemp("peaked-model"))
    config = tiny_model_config(LONG, initializer_range=0.3)
    write_initial_model(config, 128, STOP, seed=0, folder=folder)
    reference = build_reference(folder, tmp_path_factory.mktemp("peaked-weights"))
    return PeakedEngines(folder, VersionedReference(reference))


def steps(engine, count):
    """Results of so many engine steps."""
    return [result for _ in range(count) for result in engine.step()]


def run_to_end(engine, *requests):
    """Completions by request id."""
    for request in requests:
        engine.add(request)
    results = {}
    while engine.has_work():
        results |= {result.request_id: result.completions for result in engine.step()}
    return results


def make_request(
    name,
    prompt=(5, 6, 7),
    *,
    temperature=1.0,
    num_samples=1,
    seed=0,
    partial=(),
    segment_tokens=0,
    **sampling,
):
    settings = {"max_tokens": 16, "stop_token_ids": (STOP,)} | sampling
    parameters = SamplingParameters(temperature=temperature, **settings)
    return RolloutRequest(
        name, tuple(prompt), parameters, num_samples, seed, tuple(partial), segment_tokens
    )


def spread(values) -> float:
    return float(np.abs(np.asarray(values)).max())
