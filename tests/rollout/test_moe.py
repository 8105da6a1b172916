"""A real engine serves a mixture of experts that the learner published, and records its routing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paceline.configs.errors import ModelError
from paceline.configs.schema.learner import LearnerConfig
from paceline.configs.vocabulary import NOT_ROUTED, Group, Prompt, Sample
from paceline.learner.model.model import write_initial_model
from paceline.learner.worker import LearnerWorker
from tests.rollout.conftest import (
    LONG,
    STOP,
    build_engine,
    make_request,
    run_to_end,
    spread,
    steps,
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
EXACT = 1e-4


@pytest.fixture(scope="module", autouse=True)
def expert_ranks():
    """vLLM groups a process's ranks once, by experts only where its first model has any; tests make
    engines of many models in one process. Of one rank all groups are alike."""
    from vllm.distributed import parallel_state

    with pytest.MonkeyPatch.context() as patch:
        if parallel_state._TP is not None and parallel_state._EP is None:
            patch.setattr(parallel_state, "_EP", parallel_state._TP)
        yield


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    """Of a Qwen3-MoE with 2 layers of 4 experts; tests change its weights and publish them."""
    config = tiny_model_config(LONG, **EXPERTS)
    folder = str(tmp_path_factory.mktemp("learned"))
    write_initial_model(config, 128, STOP, seed=0, folder=folder)
    return LearnerWorker(
        folder,
        config,
        LearnerConfig(tokens_per_microbatch=8 * LONG),
        rank=0,
        rendezvous=None,
        weights_folder=str(tmp_path_factory.mktemp("weights")),
        seed=0,
    )


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """An engine is loaded with OTHER weights than the learner holds."""
    folder = str(tmp_path_factory.mktemp("loaded"))
    return write_initial_model(tiny_model_config(LONG, **EXPERTS), 128, STOP, 1, folder)


@pytest.fixture(scope="module")
def routed(other_folder):
    """An engine that records its routing."""
    return build_engine(other_folder, max_length=LONG, router_replay=True)


@pytest.fixture(params=["recompute", "keep", "abort"])
def engine(request, routed, monkeypatch):
    """The same engine under every policy of a weight update."""
    monkeypatch.setattr(routed, "_on_update", request.param)
    return routed


def parameters(learner):
    return dict(learner._models.policy.parts[0].named_parameters())


def group_of(request, completion):
    return Group(0, Prompt("", "", request.prompt_token_ids), (Sample(completion),))


def completion_of(group):
    return group.samples[0].completion


def errors(learner, groups, temperature=1.0):
    pairs = zip(groups, learner.logprobs(groups, temperature), strict=True)
    return [spread(completion_of(group).logprobs - found) for group, found in pairs]


def without_routing(groups):
    unrouted = (replace(completion_of(group), routed_experts=None) for group in groups)
    return [replace(g, samples=(Sample(c),)) for g, c in zip(groups, unrouted, strict=True)]


def test_log_probabilities_of_the_engine_are_the_learners_after_every_update(learner, engine):
    for version in (0, 1):
        engine.update_weights(learner.publish(version))
        request = make_request(f"r{version}", num_samples=4, seed=version, temperature=0.7)
        groups = [group_of(request, c) for c in run_to_end(engine, request)[f"r{version}"]]
        for completion in map(completion_of, groups):
            num_tokens = len(request.prompt_token_ids) + len(completion.token_ids)
            assert completion.routed_experts.shape == (num_tokens, 2, 2)
            assert (completion.routed_experts[:-1] >= 0).all()
            assert (completion.routed_experts[-1] == NOT_ROUTED).all()
        assert max(errors(learner, groups, 0.7)) < EXACT
        assert max(errors(learner, without_routing(groups), 0.7)) < EXACT
        for parameter in parameters(learner).values():
            parameter.data.mul_(1.1)


def test_replayed_routing_is_exact_where_the_learners_own_would_flip(learner, engine):
    engine.update_weights(learner.publish(2))
    request = make_request("flip", num_samples=4, max_tokens=40)
    groups = [group_of(request, c) for c in run_to_end(engine, request)["flip"]]
    # what rounding may do to any router: the same probabilities, another choice
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.topk", other_choice)
        assert max(errors(learner, without_routing(groups))) > 0.1
        assert max(errors(learner, groups)) < EXACT


def other_choice(probabilities, count, dim):
    """The least likely experts."""
    indices = probabilities.argsort(dim)[:, :count]
    return probabilities.gather(1, indices), indices


def test_cached_prompts_are_routed_as_they_were_when_they_were_read(learner, engine):
    """Of a cached block a request reads nothing; the learner must know its experts all the same."""
    engine.update_weights(learner.publish(3))
    prompt = tuple(range(2, 127)) * 2
    for name in ("reads", "finds"):
        request = make_request(name, prompt, num_samples=2, max_tokens=20)
        groups = [group_of(request, c) for c in run_to_end(engine, request)[name]]
        assert all((completion_of(g).routed_experts[:-1] >= 0).all() for g in groups)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.topk", other_choice)
            assert max(errors(learner, groups)) < EXACT


def test_interrupted_and_continued_requests_keep_the_routing_of_all_segments(learner, engine):
    engine.update_weights(learner.publish(4))
    request = make_request("cut", num_samples=3, max_tokens=24, segment_tokens=7)
    partial, num_segments = (), 0
    while not partial or not all(completion.is_finished for completion in partial):
        engine.add(replace(request, partial=partial))
        (result,) = steps(engine, 4 + num_segments % 2 * 4) or [engine.interrupt("cut")]
        partial, num_segments = result.completions, num_segments + 1
    assert num_segments > 2
    groups = [group_of(request, completion) for completion in partial]
    assert all((completion_of(g).routed_experts[:-1] >= 0).all() for g in groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.topk", other_choice)
        assert max(errors(learner, groups)) < EXACT


def test_an_update_under_way_keeps_what_each_token_was_sampled_with(learner, engine):
    """Tokens of both versions: those of the first are still routed as the first routed them."""
    engine.update_weights(learner.publish(5))
    request = make_request("moving", max_tokens=24)
    engine.add(request)
    steps(engine, 10)
    before = engine.interrupt("moving").completions[0]
    engine.add(request)
    steps(engine, 10)
    for parameter in parameters(learner).values():
        parameter.data.mul_(-1.0)
    results = engine.update_weights(learner.publish(6))
    for parameter in parameters(learner).values():
        parameter.data.mul_(-1.0)
    completions = [result.completions for result in results] or [run_to_end(engine)["moving"]]
    ((after,),) = completions
    known = len(before.routed_experts) - 1
    num_before = len(before.token_ids)
    np.testing.assert_array_equal(before.token_ids, after.token_ids[:num_before])
    np.testing.assert_array_equal(before.routed_experts[:known], after.routed_experts[:known])
    assert (after.routed_experts[:-1] >= 0).all()


def test_routing_is_exact_where_drafts_are_accepted_and_refused(learner, other_folder):
    engine = build_engine(
        other_folder, max_length=LONG, router_replay=True, drafting={"budget": "none"}
    )
    engine.update_weights(learner.publish(7))
    groups = []
    for turn in range(3):
        request = make_request(f"drafted{turn}", max_tokens=60, temperature=0.3, num_samples=2)
        groups += [group_of(request, c) for c in run_to_end(engine, request)[f"drafted{turn}"]]
    drafted, accepted = (
        sum(engine.draft_counters[f"num_{what}_{source}"] for source in ("siblings", "history"))
        for what in ("drafted", "accepted")
    )
    assert 0 < accepted < drafted
    assert all((completion_of(g).routed_experts[:-1] >= 0).all() for g in groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.topk", other_choice)
        assert max(errors(learner, groups, 0.3)) < EXACT


def test_a_model_without_experts_has_no_routing_to_record(tmp_path):
    write_initial_model(tiny_model_config(), 128, STOP, seed=0, folder=str(tmp_path))
    with pytest.raises(ModelError, match=r"rollout\.router_replay cannot record"):
        build_engine(str(tmp_path), router_replay=True)


def test_experts_that_the_cpu_kernels_would_pad_are_refused(tmp_path):
    config = tiny_model_config(**EXPERTS | {"moe_intermediate_size": 48})
    write_initial_model(config, 128, STOP, seed=0, folder=str(tmp_path))
    with pytest.raises(ModelError, match="multiple of 32"):
        build_engine(str(tmp_path))
