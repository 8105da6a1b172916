"""The real vLLM engine: live weight updates, truthful log-probabilities, exact version spans."""

import dataclasses

import numpy as np
import pytest

from paceline.configs.errors import DataError, ModelError
from paceline.learner.model.model import write_initial_model
from paceline.weights_sync.handle import WeightSyncError
from tests.rollout.conftest import (
    MAX_LENGTH,
    STOP,
    build_engine,
    build_reference,
    make_request,
    run_to_end,
    spread,
    tiny_model_config,
)

TOLERANCE = 1e-4


def chosen(reference, request, completion):
    """Reference log-probabilities of the tokens a completion chose."""
    logprobs = reference.logprobs(
        request.prompt_token_ids, completion.token_ids, request.sampling.temperature
    )
    return logprobs.gather(1, logprobs.new_tensor(completion.token_ids[:, None]).long())[:, 0]


def test_after_every_update_greedy_tokens_are_those_of_the_published_weights(engine_and_reference):
    engine, reference = engine_and_reference
    seen = set()
    for version in range(4):
        reference.perturb(seed=version)
        engine.update_weights(reference.publish(version))
        request = make_request(f"greedy-{version}", temperature=0.0)
        ((completion,),) = run_to_end(engine, request).values()
        logprobs = reference.logprobs(request.prompt_token_ids, completion.token_ids)
        assert completion.token_ids.tolist() == logprobs.argmax(-1).tolist()
        seen.add(tuple(completion.token_ids.tolist()))
    assert len(seen) > 1, "the weights changed, so some greedy completion must have"


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_logprobs_are_those_of_the_sampling_distribution(engine_and_reference, temperature):
    engine, reference = engine_and_reference
    engine.update_weights(reference.publish(10))
    request = make_request("sampled", temperature=temperature, num_samples=8)
    for completion in run_to_end(engine, request)["sampled"]:
        assert len(completion.logprobs) == len(completion.token_ids)
        expected = chosen(reference, request, completion)
        assert spread(expected.numpy() - completion.logprobs) < TOLERANCE


def test_top_k_logprobs_are_normalised_over_what_was_kept(engine_and_reference):
    engine, reference = engine_and_reference
    engine.update_weights(reference.publish(11))
    request = make_request("top", num_samples=4, top_k=5)
    for completion in run_to_end(engine, request)["top"]:
        full = reference.logprobs(request.prompt_token_ids, completion.token_ids)
        kept = full.topk(5, dim=-1)
        for position, token in enumerate(completion.token_ids):
            assert int(token) in kept.indices[position].tolist()
            expected = full[position, int(token)] - kept.values[position].logsumexp(-1)
            assert abs(float(expected) - completion.logprobs[position]) < TOLERANCE


def test_sampled_frequencies_follow_the_reported_probabilities(engine_and_reference):
    """Chi-square of the first sampled token over 4,096 draws (df = 127, p = 0.001 at 181.99)."""
    engine, reference = engine_and_reference
    engine.update_weights(reference.publish(12))
    requests = [
        make_request(f"draw-{i}", num_samples=256, seed=1000 * i, max_tokens=1, stop_token_ids=())
        for i in range(16)
    ]
    results = run_to_end(engine, *requests)
    tokens = np.array([int(c.token_ids[0]) for group in results.values() for c in group])
    probabilities = reference.logprobs(requests[0].prompt_token_ids, [0])[0].exp().numpy()
    expected = probabilities / probabilities.sum() * len(tokens)
    observed = np.bincount(tokens, minlength=128)
    large = expected >= 5
    pooled = (observed[~large].sum() - expected[~large].sum()) ** 2 / max(1, expected[~large].sum())
    statistic = ((observed - expected)[large] ** 2 / expected[large]).sum() + pooled
    assert statistic < 182


def test_a_seeded_sample_does_not_depend_on_who_shares_the_batch(engine_and_reference):
    engine, reference = engine_and_reference
    engine.update_weights(reference.publish(13))
    alone = run_to_end(engine, make_request("alone", num_samples=3, seed=42))["alone"]
    crowd = [make_request(f"other-{i}", prompt=(9, i), seed=i) for i in range(20)]
    together = run_to_end(engine, *crowd, make_request("again", num_samples=3, seed=42))["again"]
    assert [c.token_ids.tolist() for c in alone] == [c.token_ids.tolist() for c in together]


def test_spans_and_logprobs_tell_exactly_which_weights_sampled_each_token(engine_and_reference):
    engine, reference = engine_and_reference
    engine.update_weights(reference.publish(20))
    request = make_request("swapped", num_samples=4, max_tokens=40, stop_token_ids=())
    engine.add(request)
    for _ in range(15):
        engine.step()
    old = [parameter.detach().clone() for parameter in reference.model.parameters()]
    reference.perturb(seed=99)
    engine.update_weights(reference.publish(21))
    completions = run_to_end(engine)["swapped"]
    for completion in completions:
        first, second = completion.versions
        assert (first.version, first.start, second.version, second.end) == (20, 0, 21, 40)
        assert first.end == second.start == 15
        # KV was recomputed at the switch: what follows is the new weights' alone.
        new = chosen(reference, request, completion).numpy()
        assert spread((new - completion.logprobs)[15:]) < TOLERANCE
        assert spread((new - completion.logprobs)[:15]) > TOLERANCE
    for parameter, values in zip(reference.model.parameters(), old, strict=True):
        parameter.data.copy_(values)
    for completion in completions:
        before = chosen(reference, request, completion).numpy()
        assert spread((before - completion.logprobs)[:15]) < TOLERANCE


def test_stopping_and_running_out_are_told_apart(engine_and_reference):
    engine, reference = engine_and_reference
    engine.update_weights(reference.publish(22))
    stopped = run_to_end(
        engine, make_request("stops", num_samples=16, stop_token_ids=tuple(range(64)))
    )["stops"]
    assert {c.finish_reason for c in stopped if c.token_ids[-1] < 64} == {"stop"}
    cut = run_to_end(engine, make_request("cut", max_tokens=3, stop_token_ids=()))["cut"]
    assert (cut[0].finish_reason, len(cut[0].token_ids)) == ("length", 3)


def test_a_request_beyond_the_context_is_refused_and_hurts_nobody(engine_and_reference):
    engine, reference = engine_and_reference
    engine.update_weights(reference.publish(23))
    with pytest.raises(DataError, match=f"exceed the context of {MAX_LENGTH}"):
        engine.add(make_request("long", prompt=[5] * 60))
    assert "fine" in run_to_end(engine, make_request("fine"))


def test_torn_weights_are_refused(engine_and_reference):
    engine, reference = engine_and_reference
    handle = reference.publish(24)
    with pytest.raises(WeightSyncError, match="refusing to serve"):
        engine.update_weights(dataclasses.replace(handle, checksum=handle.checksum ^ 1))


def test_an_update_that_misses_a_parameter_is_refused(engine_and_reference):
    engine, reference = engine_and_reference
    handle = reference.publish(25)
    layout = dataclasses.replace(handle.layout, tensors=handle.layout.tensors[:-1])
    from paceline.weights_sync.shared_memory import buffer_checksum, map_file

    partial = map_file(handle.path, layout.num_bytes, create=False)
    lacking = dataclasses.replace(handle, layout=layout, checksum=buffer_checksum(partial))
    with pytest.raises(WeightSyncError, match="left 1 parameters"):
        engine.update_weights(lacking)


def test_more_prompt_tokens_than_one_engine_step_takes_are_sampled_all_the_same(tmp_path):
    folder = str(tmp_path / "model")
    write_initial_model(tiny_model_config(), 128, STOP, seed=0, folder=folder)
    engine = build_engine(folder, max_num_seqs=128)
    engine.update_weights(build_reference(folder, tmp_path).publish(0))
    # 128 prompts of 60 tokens are 7680; a step takes 4096
    prompts = [[5 + index % 100, *range(40, 99)] for index in range(128)]
    requests = [make_request(str(i), p, seed=i, max_tokens=4) for i, p in enumerate(prompts)]

    results = run_to_end(engine, *requests)

    assert len(results) == 128
    (alone,) = run_to_end(engine, dataclasses.replace(requests[7], request_id="alone"))["alone"]
    assert alone.token_ids.tolist() == results["7"][0].token_ids.tolist()


def test_a_model_that_vllm_cannot_load_is_the_users_to_correct(tmp_path):
    write_initial_model(tiny_model_config(), 128, STOP, seed=0, folder=str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"vLLM cannot serve the model {tmp_path}") as caught:
        build_engine(str(tmp_path))
    assert "\n" not in str(caught.value)
