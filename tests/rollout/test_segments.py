"""Rollouts cut into segments on the real engine: nothing but the cut changes."""

from dataclasses import replace

import numpy as np

from paceline.configs.vocabulary import Completion, VersionSpan, WeightVersion
from tests.rollout.conftest import make_request, run_to_end

TOLERANCE = 1e-4


def in_segments(engines, request, *, between=lambda num_segments: None):
    """Completions of a request whose segments go round the engines, and how many there were."""
    num_segments = 0
    while not (request.partial and all(c.is_finished for c in request.partial)):
        lengths = [len(c.token_ids) for c in request.partial] or [0] * request.num_samples
        between(num_segments)
        partial = run_to_end(engines[num_segments % len(engines)], request)[request.request_id]
        num_segments += 1
        for length, completion in zip(lengths, partial, strict=True):
            assert len(completion.token_ids) - length <= request.segment_tokens
            if completion.finish_reason == "segment":
                assert len(completion.token_ids) == num_segments * request.segment_tokens
        request = replace(request, partial=partial)
    return request.partial, num_segments


def test_segments_have_exact_log_probabilities_and_end_where_the_budget_ends(fleet):
    fleet.reference.serve(fleet.recompute, 1)
    request = make_request("cut", num_samples=4, max_tokens=20, segment_tokens=3, stop_token_ids=())
    completions, num_segments = in_segments([fleet.recompute], request)
    assert num_segments == 7
    for completion in completions:
        assert (len(completion.token_ids), completion.finish_reason) == (20, "length")
        assert fleet.reference.error(request, completion) < TOLERANCE


def test_each_segment_may_be_sampled_by_another_engine_and_another_version(fleet):
    engines = [fleet.recompute, fleet.abort, fleet.keep]

    def update(num_segments):
        fleet.reference.serve(engines[num_segments % 3], 1 + num_segments // 2)

    request = make_request("moves", num_samples=4, max_tokens=20, segment_tokens=3)
    request = replace(request, sampling=replace(request.sampling, stop_token_ids=(9, 99)))
    for completion in in_segments(engines, request, between=update)[0]:
        assert completion.is_finished
        versions = [(span.version, span.start) for span in completion.versions]
        assert versions == [(1 + i, 6 * i) for i in range(len(versions))]
        assert fleet.reference.error(request, completion) < TOLERANCE


def test_greedy_tokens_are_the_same_with_and_without_segments(fleet):
    fleet.reference.serve(fleet.recompute, 2)
    request = make_request("greedy", temperature=0.0, num_samples=2, max_tokens=30)
    whole = run_to_end(fleet.recompute, request)["greedy"]
    pieces, _ = in_segments([fleet.recompute], replace(request, segment_tokens=3))
    for one, other in zip(whole, pieces, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.finish_reason == other.finish_reason


def test_a_request_with_nothing_left_to_sample_is_answered_by_the_next_step(fleet):
    engine = fleet.recompute
    fleet.reference.serve(engine, 1)
    request = make_request("done", num_samples=2, max_tokens=2, stop_token_ids=())
    finished = run_to_end(engine, request)["done"]
    again = replace(request, partial=finished)
    engine.add(again)
    assert engine.has_work()
    (result,) = engine.step()
    assert result.completions == finished
    assert not engine.has_work()
    engine.add(again)
    assert engine.interrupt("done").completions == finished
    assert not engine.has_work()


def started_with(token_ids, version=1) -> Completion:
    count = len(token_ids)
    return Completion(
        np.array(token_ids, dtype=np.int32),
        np.zeros(count, dtype=np.float32),
        (VersionSpan(WeightVersion(version), 0, count),),
        "segment",
    )


def continued_tokens(engine, name, prompt, earlier, num_requests=16):
    """The one token that each of 256 samples a request goes on with after ``earlier``."""
    requests = [
        make_request(
            f"{name}-{i}",
            prompt,
            num_samples=256,
            seed=1000 * i,
            max_tokens=len(earlier) + 1,
            stop_token_ids=(),
            partial=[started_with(earlier)] * 256 if earlier else (),
        )
        for i in range(num_requests)
    ]
    results = run_to_end(engine, *requests)
    return np.array([c.token_ids[-1] for r in requests for c in results[r.request_id]])


def test_a_continued_sample_goes_on_by_the_models_probabilities(fleet):
    """Chi-square of the first continued token over 4,096 draws (df <= 127; p = 0.001 at 182)."""
    fleet.reference.serve(fleet.recompute, 1)
    prompt, earlier = (5, 6, 7), (20, 21)
    tokens = continued_tokens(fleet.recompute, "draw", prompt, earlier)
    request = make_request("expected", prompt)
    every = [fleet.reference.chosen(1, request, (*earlier, token))[-1] for token in range(128)]
    expected = np.exp(every) / np.exp(every).sum() * len(tokens)
    observed = np.bincount(tokens, minlength=128)
    large = expected >= 5
    rare = (observed[~large].sum() - expected[~large].sum()) ** 2 / max(1, expected[~large].sum())
    assert ((observed - expected)[large] ** 2 / expected[large]).sum() + rare < 182


def test_a_continuation_does_not_draw_again_what_its_first_turn_drew(fleet):
    """The same context, reached by a prompt or by a segment, is sampled independently."""
    fleet.reference.serve(fleet.recompute, 1)
    first = continued_tokens(fleet.recompute, "first", (5, 6, 7), (), num_requests=4)
    again = continued_tokens(fleet.recompute, "again", (5, 6), (7,), num_requests=4)
    frequencies = np.bincount(first, minlength=128) / len(first)
    by_chance = (frequencies**2).sum()
    assert np.mean(first == again) < by_chance + 0.1
