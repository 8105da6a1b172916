"""A tiny model, and one real vLLM engine for all tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from paceline.configs.schema.model import ModelConfig
from paceline.configs.schema.rollout import RolloutConfig
from paceline.configs.vocabulary import RolloutRequest, SamplingParameters
from paceline.learner.model import write_initial_model
from paceline.weights_sync.layout import Layout, TensorSpec
from paceline.weights_sync.shared_memory import Shard, SharedMemoryPublisher

MAX_LENGTH = 64
STOP = 1


def tiny_model_config(**changes) -> ModelConfig:
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
    return ModelConfig(architecture=architecture, tokenizer="characters", max_length=MAX_LENGTH)


@dataclass
class Reference:
    """The Hugging Face model the engine must agree with, and the way its weights are published."""

    model: torch.nn.Module
    publisher: SharedMemoryPublisher

    def publish(self, version: int):
        shards = [
            Shard(name, tuple(slice(0, size) for size in parameter.shape), parameter)
            for name, parameter in self.model.named_parameters()
        ]
        self.publisher.write(version, shards)
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
    specs = tuple(TensorSpec(n, tuple(p.shape), "float32") for n, p in model.named_parameters())
    return Reference(model, SharedMemoryPublisher(str(shared), Layout(specs)))


def build_engine(folder: str, max_num_seqs: int = 32):
    from paceline.rollout.vllm_engine import VLLMEngine

    return VLLMEngine(
        folder,
        RolloutConfig(max_num_seqs=max_num_seqs, kv_cache_mb=16),
        max_length=MAX_LENGTH,
        dtype="float32",
        seed=0,
    )


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def engine_and_reference(request, tmp_path_factory):
    """An engine that was loaded with OTHER weights than the reference holds now."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_model_config(tie_word_embeddings=request.param)
    write_initial_model(config, 128, STOP, seed=0, folder=str(folder))
    engine = build_engine(str(folder))
    return engine, build_reference(str(folder), tmp_path_factory.mktemp("weights"))


def run_to_end(engine, *requests):
    """Completions by request id."""
    for request in requests:
        engine.add(request)
    results = {}
    while engine.has_work():
        results |= {result.request_id: result.completions for result in engine.step()}
    return results


def make_request(name, prompt=(5, 6, 7), *, temperature=1.0, num_samples=1, seed=0, **sampling):
    settings = {"max_tokens": 16, "stop_token_ids": (STOP,)} | sampling
    parameters = SamplingParameters(temperature=temperature, **settings)
    return RolloutRequest(name, tuple(prompt), parameters, num_samples, seed)


def spread(values) -> float:
    return float(np.abs(np.asarray(values)).max())
