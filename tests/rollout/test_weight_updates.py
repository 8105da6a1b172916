"""Updates in flight on the real engine: whose weights sampled each token, under every policy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.rollout.conftest import make_request, run_to_end, spread, steps

TOLERANCE = 1e-4
TWO_BLOCKS = tuple(5 + (7 * i) % 100 for i in range(300))
"""A prompt that leaves two blocks of 128 tokens in vLLM's prefix cache."""


@torch.no_grad()
def mixture(reference, request, completion):
    """Log-probabilities [C] where each version computes keys and values from its first step on.

    The version that samples a token computes the keys and values of the token before it: the last
    one a version samples is the first that the next version attends with.
    """
    prompt, cache, rows = list(request.prompt_token_ids), None, []
    ids = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
    done = 0
    for span in completion.versions:
        model = reference.load(span.version)
        upto = len(prompt) + span.end - 1
        output = model(ids[:, done:upto], past_key_values=cache, use_cache=True)
        rows.append(output.logits[0, -(span.end - span.start) :])
        cache, done = output.past_key_values, upto
    logprobs = (torch.cat(rows) / request.sampling.temperature).log_softmax(-1)
    return logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def swapped(fleet, engine, name):
    """A request of four samples through versions 1, 2 and 3, and its completions."""
    fleet.reference.serve(engine, 1)
    request = make_request(name, num_samples=4, max_tokens=40, stop_token_ids=(), seed=3)
    engine.add(request)
    for version in (2, 3):
        assert steps(engine, 12) == []
        assert fleet.reference.serve(engine, version) == []
    return request, run_to_end(engine)[name]


def test_recompute_every_span_is_of_its_version_alone(fleet):
    request, completions = swapped(fleet, fleet.recompute, "recompute")
    for completion in completions:
        assert [(s.version, s.end) for s in completion.versions] == [(1, 12), (2, 24), (3, 40)]
        assert fleet.reference.error(request, completion) < TOLERANCE


def test_keep_is_exact_before_the_first_switch_and_a_mixture_after_it(fleet):
    request, completions = swapped(fleet, fleet.keep, "keep")
    for completion in completions:
        assert [(s.version, s.end) for s in completion.versions] == [(1, 12), (2, 24), (3, 40)]
        first = fleet.reference.chosen(1, request, completion.token_ids) - completion.logprobs
        assert spread(first[:12]) < TOLERANCE
        # every number is that of new weights over the keys and values that old ones left ...
        expected = mixture(fleet.reference, request, completion)
        assert spread(expected - completion.logprobs) < TOLERANCE
    # ... and not that of the new weights alone: had KV been recomputed, this would be 0
    for version, start, end in ((2, 12, 24), (3, 24, 40)):
        distances = [
            fleet.reference.chosen(version, request, c.token_ids)[start:end] - c.logprobs[start:end]
            for c in completions
        ]
        assert np.abs(distances).mean() > 100 * TOLERANCE


def test_abort_gives_everything_back_and_any_engine_goes_on_with_it(fleet):
    engines = {"the same": fleet.abort, "another": fleet.recompute}
    fleet.reference.serve(fleet.abort, 1)
    for name, other in engines.items():
        request = make_request(name, num_samples=4, max_tokens=40, stop_token_ids=(), seed=5)
        fleet.abort.add(request)
        steps(fleet.abort, 12)
        (result,) = fleet.reference.serve(fleet.abort, 2)
        assert result.request_id == name
        assert not fleet.abort.has_work()
        assert {c.finish_reason for c in result.completions} == {"abort"}
        assert {len(c.token_ids) for c in result.completions} == {12}
        fleet.reference.serve(other, 3)
        continued = replace(request, partial=result.completions)
        for completion, before in zip(
            run_to_end(other, continued)[name], result.completions, strict=True
        ):
            assert completion.token_ids[:12].tolist() == before.token_ids.tolist()
            assert (completion.finish_reason, len(completion.token_ids)) == ("length", 40)
            assert completion.versions[0].end == 12
            assert [s.version for s in completion.versions][1:] == [3]
            assert fleet.reference.error(request, completion) < TOLERANCE
        fleet.reference.serve(fleet.abort, 1)


def test_abort_keeps_finished_samples_and_gives_back_those_that_never_began(fleet):
    fleet.reference.serve(fleet.abort, 1)
    # every token but one ends a sample at once; the engine runs 8 of the 20 samples at a time
    request = make_request("mixed", num_samples=20, max_tokens=9, stop_token_ids=tuple(range(90)))
    fleet.abort.add(request)
    steps(fleet.abort, 2)
    (result,) = fleet.reference.serve(fleet.abort, 2)
    reasons = [c.finish_reason for c in result.completions]
    assert {"stop", "abort"} == set(reasons)
    assert 0 in [len(c.token_ids) for c in result.completions]
    (again,) = run_to_end(fleet.abort, replace(request, partial=result.completions)).values()
    for before, after in zip(result.completions, again, strict=True):
        assert after.is_finished
        assert fleet.reference.error(request, after) < TOLERANCE
        if before.is_finished:
            assert after is before


@pytest.mark.parametrize("policy", ["recompute", "keep", "abort"])
def test_new_requests_never_meet_what_older_weights_left_in_the_prefix_cache(fleet, policy):
    engine = getattr(fleet, policy)
    for version in (1, 2, 3, 1):
        fleet.reference.serve(engine, version)
        for turn in range(2):  # the second hits what the first one left
            request = make_request(f"{version}-{turn}", TWO_BLOCKS, num_samples=2, max_tokens=4)
            for completion in run_to_end(engine, request)[request.request_id]:
                assert fleet.reference.error(request, completion) < TOLERANCE


def test_keep_what_waits_for_its_first_token_begins_with_the_new_weights_alone(fleet):
    fleet.reference.serve(fleet.keep, 1)
    request = make_request("queue", TWO_BLOCKS, num_samples=20, max_tokens=8, stop_token_ids=())
    fleet.keep.add(request)
    steps(fleet.keep, 3)
    fleet.reference.serve(fleet.keep, 2)
    completions = run_to_end(fleet.keep)["queue"]
    begun = [c for c in completions if c.versions[0].version == 1]
    assert len(begun) == 8
    for completion in completions[8:]:
        assert [s.version for s in completion.versions] == [2]
        assert fleet.reference.error(request, completion) < TOLERANCE
    assert len({c.token_ids.tobytes() for c in completions}) == 20, "streams stay apart"


def test_an_interrupted_request_leaves_with_what_it_has_and_the_others_stay(fleet):
    engine = fleet.recompute
    fleet.reference.serve(engine, 1)
    taken, stays = (
        make_request(name, num_samples=3, max_tokens=20, stop_token_ids=(), seed=seed)
        for name, seed in (("taken", 1), ("stays", 2))
    )
    alone = run_to_end(engine, stays)["stays"]
    engine.add(taken)
    engine.add(stays)
    steps(engine, 7)
    result = engine.interrupt("taken")
    assert {(len(c.token_ids), c.finish_reason) for c in result.completions} == {(7, "abort")}
    assert engine.interrupt("taken") is None
    assert engine.interrupt("never came") is None
    results = run_to_end(engine)
    assert list(results) == ["stays"]
    for completion, before in zip(results["stays"], alone, strict=True):
        assert completion.token_ids.tolist() == before.token_ids.tolist()
    for completion in run_to_end(engine, replace(taken, partial=result.completions))["taken"]:
        assert len(completion.token_ids) == 20
        assert fleet.reference.error(taken, completion) < TOLERANCE


event = st.sampled_from(["swap", "interrupt", "segment", "step", "step"])


@pytest.mark.parametrize("policy", ["recompute", "abort"])
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(event, st.integers(1, 4)), max_size=10), st.integers(1, 30))
def test_whatever_happens_to_a_request_its_log_probabilities_are_those_of_its_spans(
    fleet, policy, events, max_tokens
):
    engine, others = getattr(fleet, policy), [fleet.recompute, fleet.abort]
    request = make_request("r", num_samples=3, max_tokens=max_tokens, stop_token_ids=range(6))
    versions = {id(e): 1 for e in others}
    for each in others:
        each.interrupt("r")  # an example that failed leaves it there
        fleet.reference.serve(each, 1)
    engine.add(request)
    completions = None
    for kind, count in [*events, ("end", 0)]:
        results = steps(engine, count)
        if kind == "swap":
            versions[id(engine)] = versions[id(engine)] % 3 + 1
            results += fleet.reference.serve(engine, versions[id(engine)])
        elif kind != "step" and not results:
            results = [engine.interrupt("r")]
        if results:
            (result,) = results
            completions = result.completions
            for completion in completions:
                assert fleet.reference.error(request, completion) < TOLERANCE
            if all(completion.is_finished for completion in completions):
                break
            engine = next(e for e in others if e is not engine)
            segment = count if kind == "segment" else 0
            engine.add(replace(request, partial=completions, segment_tokens=segment))
    if engine.has_work():
        completions = run_to_end(engine)["r"]
    for completion in completions:
        assert len(completion.token_ids) <= max_tokens
        assert fleet.reference.error(request, completion) < TOLERANCE
