"""What a teacher's engine says of completions is what its model says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paceline.configs.schema.rollout import RolloutConfig
from paceline.configs.vocabulary import Completion, WeightVersion
from paceline.learner.model.model import write_initial_model
from tests.rollout.conftest import (
    MAX_LENGTH,
    STOP,
    build_reference,
    make_request,
    run_to_end,
    spread,
    tiny_model_config,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An engine that serves a folder's weights as they are, and the model itself."""
    from vllm.v1.engine import core

    from paceline.rollout.vllm_engine import VLLMEngine

    core.cleanup_dist_env_and_memory = lambda: None
    folder = str(tmp_path_factory.mktemp("teacher"))
    write_initial_model(tiny_model_config(), 128, STOP, seed=5, folder=folder)
    engine = VLLMEngine(
        folder,
        RolloutConfig(max_num_seqs=8, kv_cache_mb=16),
        max_length=MAX_LENGTH,
        dtype="float32",
        seed=0,
        fixed_version=WeightVersion(0),
    )
    return engine, build_reference(folder, tmp_path_factory.mktemp("unused"))


def sampled(generator, length, finish_reason="stop"):
    return Completion(
        token_ids=generator.integers(2, 128, length).astype(np.int32),
        logprobs=np.full(length, -9.0, dtype=np.float32),
        versions=(),
        finish_reason=finish_reason,
    )


def test_scores_are_the_models_log_probabilities(teacher):
    engine, reference = teacher
    generator = np.random.default_rng(0)
    requests = []
    for number, prompt_length in enumerate((1, 5, 9)):
        completions = [sampled(generator, length) for length in (1, 4, 11)]
        prompt = [int(t) for t in generator.integers(2, 128, prompt_length)]
        request = make_request(f"score-{number}", prompt, num_samples=3, partial=completions)
        requests.append(replace(request, scores=True))
    answers = run_to_end(engine, *requests)
    for request in requests:
        for given, scored in zip(request.partial, answers[request.request_id], strict=True):
            assert scored.token_ids.tolist() == given.token_ids.tolist()
            assert scored.finish_reason == "stop"
            logprobs = reference.logprobs(request.prompt_token_ids, given.token_ids)
            expected = logprobs.numpy()[np.arange(len(given.token_ids)), given.token_ids]
            assert spread(scored.logprobs - expected) < 1e-4


def test_a_completion_up_to_the_very_end_of_the_context_is_scored(teacher):
    engine, _ = teacher
    generator = np.random.default_rng(1)
    longest = sampled(generator, MAX_LENGTH - 3, "length")
    request = make_request("whole", max_tokens=MAX_LENGTH - 3, partial=[longest])
    (scored,) = run_to_end(engine, replace(request, scores=True))["whole"]
    assert scored.finish_reason == "length"
    assert len(scored.logprobs) == MAX_LENGTH - 3
    assert (scored.logprobs < 0).all()


@pytest.mark.parametrize(("has", "expected"), [(32, 65), (65, 65), (4096, 4096)])
def test_a_teacher_never_loses_positions_that_its_model_has(has, expected):
    from transformers import Qwen3Config

    from paceline.rollout.vllm_engine import with_positions

    config = with_positions(65, Qwen3Config(max_position_embeddings=has))
    assert config.max_position_embeddings == expected


def test_a_score_that_is_taken_back_says_so(teacher):
    engine, _ = teacher
    request = make_request("back", partial=[sampled(np.random.default_rng(2), 4)])
    engine.add(replace(request, scores=True))
    result = engine.interrupt("back")
    assert result.completions[0].finish_reason == "abort"
    assert not engine.has_work()
