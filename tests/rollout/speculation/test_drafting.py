"""An engine that drafts gives what one that does not draft gives, in fewer steps."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.configs.vocabulary import DRAFTED_FROM_SIBLINGS
from paceline.learner.model.model import write_initial_model
from tests.rollout.conftest import (
    ALWAYS,
    LONG,
    STOP,
    VersionedReference,
    build_engine,
    build_reference,
    make_request,
    run_to_end,
    steps,
    tiny_model_config,
)

pytestmark = pytest.mark.slow

BUDGET = 48


def num_steps(engine, *requests):
    for request in requests:
        engine.add(request)
    results, count = {}, 0
    while engine.has_work():
        results |= {result.request_id: result.completions for result in engine.step()}
        count += 1
    return results, count


def num_accepted(engine):
    counters = engine.draft_counters
    return counters["num_accepted_siblings"] + counters["num_accepted_history"]


def num_drafted(engine):
    counters = engine.draft_counters
    return counters["num_drafted_siblings"] + counters["num_drafted_history"]


def test_greedy_tokens_are_the_same_and_take_fewer_steps(engines):
    drafting, plain = engines.drafting, engines.undrafted
    engines.serve(1)
    settings = {"temperature": 0.0, "max_tokens": BUDGET, "stop_token_ids": ()}
    expected, slow = num_steps(plain, make_request("plain", **settings))
    expected = expected["plain"]
    before = num_accepted(drafting)
    first, own = num_steps(drafting, make_request("first", **settings))
    again, fast = num_steps(drafting, make_request("again", **settings))
    for found in (first["first"], again["again"]):
        assert found[0].token_ids.tolist() == expected[0].token_ids.tolist()
        np.testing.assert_allclose(found[0].logprobs, expected[0].logprobs, atol=1e-4)
    assert own < slow, "a sample repeats itself too"
    assert fast < 0.5 * slow, "what was sampled before is drafted, and accepted"
    assert num_accepted(drafting) - before >= BUDGET - fast


def test_log_probabilities_are_those_of_the_spans_across_updates_in_the_middle(engines):
    drafting, reference = engines.drafting, engines.reference
    engines.serve(2)
    warm = make_request("warm", max_tokens=BUDGET, num_samples=4, stop_token_ids=())
    run_to_end(drafting, warm)
    before = num_drafted(drafting)
    request = make_request("mixed", max_tokens=BUDGET, num_samples=4, seed=3, stop_token_ids=())
    drafting.add(request)
    results = {}
    for version in (3, 4):
        results |= {r.request_id: r.completions for r in steps(drafting, 5)}
        engines.serve(version)
    while drafting.has_work():
        results |= {result.request_id: result.completions for result in drafting.step()}
    assert num_drafted(drafting) > before
    for completion in results["mixed"]:
        assert len(completion.token_ids) == BUDGET
        assert len(completion.versions) > 1, "no update fell into it"
        assert reference.error(request, completion) < 1e-4


def test_what_stops_within_a_draft_stops(engines):
    drafting, plain = engines.drafting, engines.undrafted
    engines.serve(5)
    greedy = {"temperature": 0.0, "max_tokens": BUDGET}
    (whole,) = run_to_end(plain, make_request("whole", **greedy, stop_token_ids=()))["whole"]
    run_to_end(drafting, make_request("learn", **greedy, stop_token_ids=()))
    tokens = whole.token_ids.tolist()
    stop = tokens[BUDGET // 2]
    expected = tokens[: tokens.index(stop) + 1]
    (found,) = run_to_end(drafting, make_request("stop", **greedy, stop_token_ids=(stop,)))["stop"]
    assert found.token_ids.tolist() == expected
    assert found.finish_reason == "stop"
    for budget in range(1, 8):
        short = make_request(f"{budget}", temperature=0.0, max_tokens=budget, stop_token_ids=())
        (found,) = run_to_end(drafting, short)[f"{budget}"]
        assert found.token_ids.tolist() == tokens[:budget]


def test_an_interrupted_sample_leaves_with_whole_rounds_and_is_continued(engines):
    drafting, plain = engines.drafting, engines.undrafted
    engines.serve(6)
    settings = {"temperature": 0.0, "max_tokens": BUDGET, "stop_token_ids": ()}
    expected = run_to_end(plain, make_request("e", **settings))["e"][0].token_ids.tolist()
    run_to_end(drafting, make_request("l", **settings))
    drafting.add(make_request("cut", **settings))
    steps(drafting, 3)
    (partial,) = drafting.interrupt("cut").completions
    assert partial.token_ids.tolist() == expected[: len(partial.token_ids)]
    assert 3 < len(partial.token_ids) < BUDGET
    (whole,) = run_to_end(plain, make_request("on", **settings, partial=[partial]))["on"]
    assert whole.token_ids.tolist() == expected


def test_every_token_says_whether_it_was_drafted_and_from_what(engines):
    drafting = engines.drafting
    engines.serve(7)
    settings = {"temperature": 0.0, "max_tokens": BUDGET, "stop_token_ids": ()}
    before = num_accepted(drafting)
    (first,) = run_to_end(drafting, make_request("f", **settings))["f"]
    (again,) = run_to_end(drafting, make_request("a", **settings))["a"]
    engines.serve(8)
    (later,) = run_to_end(drafting, make_request("l", **settings))["l"]
    sources = [completion.draft_sources for completion in (first, again, later)]
    assert all(len(each) == BUDGET for each in sources)
    assert sum(np.count_nonzero(each) for each in sources) == num_accepted(drafting) - before
    assert np.count_nonzero(again.draft_sources == DRAFTED_FROM_SIBLINGS) > BUDGET // 2


def test_drafts_reach_to_the_end_of_the_context(engines):
    """The longest draft that is configured does not fit any more, a shorter one does."""
    drafting = engines.drafting
    engines.serve(9)
    prompt = (5, 9, 3)
    whole = LONG - len(prompt)
    settings = {"temperature": 0.0, "max_tokens": whole, "stop_token_ids": ()}
    run_to_end(drafting, make_request("first", prompt, **settings))
    (again,) = run_to_end(drafting, make_request("again", prompt, **settings))["again"]
    assert len(again.token_ids) == whole
    assert np.count_nonzero(again.draft_sources[-4:]) >= 3


def test_samples_that_lost_their_place_in_the_cache_are_drafted_for_again(tmp_path, monkeypatch):
    """With too little cache vLLM preempts: a sample's drafts are dropped and it starts again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    folder = str(tmp_path / "model")
    wide = {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 64}
    config = tiny_model_config(LONG, initializer_range=0.3, **wide)
    write_initial_model(config, 128, STOP, 0, folder)
    plain = build_engine(folder, max_num_seqs=8, max_length=LONG)
    drafting = build_engine(folder, 8, max_length=LONG, kv_cache_mb=8, drafting=ALWAYS)
    reference = VersionedReference(build_reference(folder, tmp_path / "published"))
    for engine in (plain, drafting):
        reference.serve(engine, 1)
    preempted = []
    preempt = Scheduler._preempt_request
    monkeypatch.setattr(
        Scheduler,
        "_preempt_request",
        lambda self, request, *rest, **named: (
            preempted.append(bool(request.spec_token_ids)),
            preempt(self, request, *rest, **named),
        )[1],
    )
    requests = [
        make_request(f"{index}", (5 + index, 9), temperature=0.0, max_tokens=200, stop_token_ids=())
        for index in range(8)
    ]
    expected = run_to_end(plain, *requests)
    preempted.clear()
    for round_name in ("cold", "warm"):
        found = run_to_end(drafting, *requests)
        for name, (completion,) in found.items():
            assert completion.token_ids.tolist() == expected[name][0].token_ids.tolist(), round_name
            assert len(completion.draft_sources) == len(completion.token_ids)
    assert any(preempted), "nobody lost drafts: nothing was tested"
    assert num_accepted(drafting) > 0
