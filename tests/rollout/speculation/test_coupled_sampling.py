"""Coupled sampling: a sample is fixed by its seed and the weights, and by nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.rollout.conftest import (
    STOP,
    make_request,
    run_to_end,
    steps,
)
from tests.rollout.speculation.drafters import ScriptedDrafter
from tests.rollout.speculation.test_drafted_distribution import (
    SUSPICIOUS,
    chi_square_probability,
    constrained,
)

pytestmark = pytest.mark.slow
BUDGET = 48
VOCABULARY = 128


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.0},
]


def mixed_requests(**changes):
    """Four samples for each of the settings, to be sampled in one batch."""
    named = {"num_samples": 4, "max_tokens": BUDGET} | changes
    return [
        make_request(f"mixed {number}", prompt=(5, 6, number), seed=50 * number, **named, **setting)
        for number, setting in enumerate(SETTINGS)
    ]


class Scripts:
    """Drafts by somebody who knows what will be sampled."""

    def __init__(self, requests, results) -> None:
        self._texts = [
            [*request.prompt_token_ids, *completion.token_ids.tolist()]
            for request in requests
            for completion in results[request.request_id]
        ]
        self._random = random.Random(0)

    def nothing(self, tokens):
        return []

    def right(self, tokens):
        found = [text for text in self._texts if text[: len(tokens)] == tokens]
        return found[0][len(tokens) :] if found else []

    def right_and_further(self, tokens):
        return [*self.right(tokens), 7, 7, 7, 7]

    def wrong(self, tokens):
        return [(token + 1) % VOCABULARY for token in self.right(tokens)]

    def sometimes_right(self, tokens):
        return [token if self._random.random() < 0.7 else 9 for token in self.right(tokens)]

    def stopping(self, tokens):
        return [STOP, 5, STOP, 5]

    def of_any_length(self, tokens):
        return self.right(tokens)[: self._random.randrange(5)]


def assert_the_same(results, expected):
    assert results.keys() == expected.keys()
    for name, completions in expected.items():
        for found, wanted in zip(results[name], completions, strict=True):
            assert found.token_ids.tolist() == wanted.token_ids.tolist(), name
            assert found.finish_reason == wanted.finish_reason
            np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    "script",
    [
        "nothing",
        "right",
        "right_and_further",
        "wrong",
        "sometimes_right",
        "stopping",
        "of_any_length",
    ],
)
def test_whatever_is_drafted_the_tokens_are_the_same(engines, script):
    engines.serve(1)
    requests = mixed_requests()
    expected = run_to_end(engines.coupled_undrafted, *requests)
    ScriptedDrafter.script, ScriptedDrafter.num_drafted = (
        getattr(Scripts(requests, expected), script),
        0,
    )
    assert_the_same(run_to_end(engines.coupled_scripted, *requests), expected)
    assert (ScriptedDrafter.num_drafted > 0) == (script != "nothing")


def test_drafts_from_siblings_that_know_the_noise_change_no_token_and_are_accepted(engines):
    engines.serve(8)
    requests = mixed_requests(num_samples=12, stop_token_ids=())
    expected = run_to_end(engines.coupled_undrafted, *requests)
    engine = engines.coupled_drafting
    for request in requests:
        engine.add(request)
    results = {result.request_id: result.completions for result in steps(engine, 6)}
    cut = {request.request_id: engine.interrupt(request.request_id) for request in requests}
    results |= {name: result.completions for name, result in cut.items() if result is not None}
    waiting = [replace(request, partial=results[request.request_id]) for request in requests]
    results |= run_to_end(engine, *waiting)
    assert_the_same(results, expected)
    sources = np.concatenate([c.draft_sources for each in results.values() for c in each])
    assert (sources > 0).mean() > 0.05


@pytest.mark.parametrize("coupled", [True, False])
def test_only_under_coupled_sampling_a_drafter_is_told_the_seed(engines, coupled, monkeypatch):
    """Under the ratio rule a draft that knows the verifier's randomness biases what is sampled."""
    engine = engines.coupled_drafting if coupled else engines.drafting
    engines.serve(9)
    told = []
    reader = engine._proposer._reader
    opened = reader.open
    monkeypatch.setattr(
        reader, "open", lambda name, *noise: told.append(noise[0]) or opened(name, *noise)
    )
    run_to_end(engine, make_request("told", num_samples=3, seed=70, max_tokens=4))
    assert told == ([70, 71, 72] if coupled else [None] * 3)


def test_right_drafts_are_accepted_whole(engines):
    engines.serve(1)
    requests = mixed_requests(stop_token_ids=())
    expected = run_to_end(engines.coupled_undrafted, *requests)
    ScriptedDrafter.script = Scripts(requests, expected).right
    for request in requests:
        engines.coupled_scripted.add(request)
    count = 0
    while engines.coupled_scripted.has_work():
        engines.coupled_scripted.step()
        count += 1
    # a prompt and its first token, then four drafted tokens and one more a step
    assert count <= 2 + BUDGET // 5 + 1


def test_under_the_ratio_rule_drafts_change_the_tokens(engines):
    """Else the tests above could not fail."""
    engines.serve(1)
    requests = mixed_requests()[:1]
    ScriptedDrafter.script = lambda tokens: []
    expected = run_to_end(engines.scripted, *requests)
    ScriptedDrafter.script = Scripts(requests, expected).sometimes_right
    found = run_to_end(engines.scripted, *requests)
    with pytest.raises(AssertionError):
        assert_the_same(found, expected)


def test_neither_the_batch_nor_turns_nor_interrupts_nor_another_worker_change_a_sample(engines):
    engines.serve(2)
    requests = mixed_requests()
    expected = run_to_end(engines.coupled_undrafted, *requests)
    ScriptedDrafter.script = Scripts(requests, expected).sometimes_right
    whole = {request.request_id: request for request in requests}
    for name, request in whole.items():
        assert_the_same(run_to_end(engines.coupled_undrafted, request), {name: expected[name]})
    workers, num_segments = [engines.coupled_scripted, engines.coupled_undrafted], 0
    waiting, left = mixed_requests(segment_tokens=7), {}
    while waiting:
        engine = workers[num_segments % 2]
        for request in waiting:
            engine.add(request)
        left |= {result.request_id: result.completions for result in steps(engine, 3)}
        for request in waiting:
            cut = engine.interrupt(request.request_id)
            left |= {} if cut is None else {cut.request_id: cut.completions}
        waiting = [
            replace(request, partial=left[request.request_id])
            for request in waiting
            if not all(completion.is_finished for completion in left[request.request_id])
        ]
        num_segments += 1
    assert num_segments > 4
    assert_the_same(left, expected)


def test_after_an_update_samples_go_on_as_the_new_weights_say(engines):
    engines.serve(3)
    requests = mixed_requests(stop_token_ids=())
    before = run_to_end(engines.coupled_undrafted, *requests)
    ScriptedDrafter.script = Scripts(requests, before).sometimes_right
    for request in requests:
        engines.coupled_scripted.add(request)
    steps(engines.coupled_scripted, 5)
    engines.serve(4)
    results = {}
    while engines.coupled_scripted.has_work():
        results |= {r.request_id: r.completions for r in engines.coupled_scripted.step()}
    for request in requests:
        for index, found in enumerate(results[request.request_id]):
            assert [span.version for span in found.versions] == [3, 4]
            switch = found.versions[0].end
            old = before[request.request_id][index].token_ids
            assert found.token_ids[:switch].tolist() == old[:switch].tolist()
            prompt = (*request.prompt_token_ids, *found.token_ids[:switch].tolist())
            setting = SETTINGS[int(request.request_id.split()[1])]
            rest = make_request(
                "rest",
                prompt,
                seed=request.seed + index,
                max_tokens=BUDGET - switch,
                stop_token_ids=(),
                **setting,
            )
            (continued,) = run_to_end(engines.coupled_undrafted, rest)["rest"]
            assert found.token_ids[switch:].tolist() == continued.token_ids.tolist()


def test_greedy_samples_are_those_of_vllm_and_seeds_make_others_differ(engines):
    engines.serve(5)
    ScriptedDrafter.script = lambda tokens: []
    greedy = make_request("greedy", temperature=0.0, num_samples=2, max_tokens=BUDGET)
    expected = run_to_end(engines.scripted, greedy)
    assert_the_same(run_to_end(engines.coupled_undrafted, greedy), expected)
    request = make_request("random", num_samples=8, max_tokens=BUDGET, stop_token_ids=())
    samples = [
        c.token_ids.tolist() for c in run_to_end(engines.coupled_undrafted, request)["random"]
    ]
    assert len(set(map(tuple, samples))) == 8


def test_an_engine_that_samples_coupled_scores_as_any_other(engines):
    engines.serve(7)
    request = make_request("scored", num_samples=3, max_tokens=9)
    completions = run_to_end(engines.coupled_undrafted, request)["scored"]
    asked = replace(request, partial=completions, scores=True)
    scores = run_to_end(engines.coupled_scripted, asked)["scored"]
    assert_the_same({"scored": scores}, {"scored": completions})


@pytest.mark.parametrize("drafts", [True, False])
def test_tokens_are_distributed_as_the_model_says(engines, drafts):
    engines.serve(6)
    model = engines.reference.load(6)
    prompt, num_samples = (5, 9, 3), 1500
    settings = [setting for setting in SETTINGS if setting["temperature"]]
    exact = [pair_probabilities(model, prompt, **setting) for setting in settings]
    likely = int(exact[0].sum(0).argmax())
    ScriptedDrafter.script = lambda tokens: [likely, likely]
    requests = [
        make_request(
            f"{number}",
            prompt,
            num_samples=num_samples,
            seed=number * num_samples,
            max_tokens=2,
            stop_token_ids=(),
            **setting,
        )
        for number, setting in enumerate(settings)
    ]
    results = run_to_end(
        engines.coupled_scripted if drafts else engines.coupled_undrafted, *requests
    )
    for number, pairs in enumerate(exact):
        tokens = np.array([c.token_ids for c in results[f"{number}"]])
        found = tokens[:, 0].astype(np.int64) * VOCABULARY + tokens[:, 1]
        assert chi_square_probability(found, pairs.flatten()) > SUSPICIOUS, settings[number]


@torch.no_grad()
def pair_probabilities(model, prompt, **setting):
    """Probability of every first and second token, float64 [V, V]."""
    first = constrained(model(torch.tensor([prompt])).logits[0, -1], **setting)
    continued = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
    second = constrained(model(continued).logits[:, -1], **setting)
    return (first / first.sum())[:, None] * second / second.sum(-1, keepdim=True)
