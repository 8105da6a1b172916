"""A real engine serves a mixture of experts that the learner published."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.configs.errors import ModelError
from paceline.configs.schema.learner import LearnerConfig
from paceline.configs.vocabulary import Prompt, TrainSample, Trajectory
from paceline.learner.model import write_initial_model
from paceline.learner.worker import LearnerWorker
from tests.rollout.conftest import (
    STOP,
    build_engine,
    make_request,
    run_to_end,
    spread,
    tiny_model_config,
)

EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def learner_and_engine(tmp_path_factory):
    """The engine was loaded with OTHER weights than the learner holds."""
    config = tiny_model_config(**EXPERTS)
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("learned", "loaded")]
    for seed, folder in enumerate(folders):
        write_initial_model(config, 128, STOP, seed=seed, folder=folder)
    learner = LearnerWorker(
        folders[0],
        config,
        LearnerConfig(tokens_per_microbatch=512),
        rank=0,
        rendezvous=None,
        weights_folder=str(tmp_path_factory.mktemp("weights")),
        seed=0,
    )
    return learner, build_engine(folders[1])


def sample_of(request, completion):
    prompt = Prompt("", "", request.prompt_token_ids)
    whole = Trajectory.from_completion(prompt, completion)
    return TrainSample(whole.token_ids, whole.loss_mask, whole.logprobs)


def test_log_probabilities_of_the_engine_are_the_learners_after_every_update(learner_and_engine):
    learner, engine = learner_and_engine
    found = []
    for version in (0, 1):
        engine.update_weights(learner.publish(version))
        request = make_request(f"r{version}", num_samples=4, seed=version, temperature=0.7)
        samples = [sample_of(request, c) for c in run_to_end(engine, request)[f"r{version}"]]
        expected = learner.logprobs(samples, temperature=0.7)
        for sample, logprobs in zip(samples, expected, strict=True):
            assert spread(sample.logprobs - logprobs) < 1e-4
        found.append(np.concatenate(expected))
        for parameter in learner._models.policy.parts[0].parameters():
            parameter.data.mul_(1.1)


def test_experts_that_the_cpu_kernels_would_pad_are_refused(tmp_path):
    config = tiny_model_config(**EXPERTS | {"moe_intermediate_size": 48})
    write_initial_model(config, 128, STOP, seed=0, folder=str(tmp_path))
    with pytest.raises(ModelError, match="multiple of 32"):
        build_engine(str(tmp_path))
