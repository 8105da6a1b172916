"""Coupled sampling: a sample is fixed by its seed and the weights, and by nothing else."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from paceline.configs.schema.rollout import DraftingConfig, RolloutConfig
from paceline.learner.model.model import write_initial_model
from paceline.rollout import coupled_sampling
from paceline.rollout.coupled_sampling import CoupledSampler, CoupledVerifier, noisy_argmax
from paceline.spec import noise
from tests.rollout.conftest import (
    LONG,
    STOP,
    VersionedReference,
    build_reference,
    make_request,
    run_to_end,
    steps,
    tiny_model_config,
)
from tests.rollout.drafters import ScriptedDrafter
from tests.rollout.test_drafted_distribution import (
    SUSPICIOUS,
    chi_square_probability,
    constrained,
)

slow = pytest.mark.slow
BUDGET = 48
VOCABULARY = 128


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A model, and engines of it that sample coupled or as vLLM does, with drafts and without."""
    from vllm.v1.engine import core

    from paceline.rollout.vllm_engine import VLLMEngine

    core.cleanup_dist_env_and_memory = lambda: None
    folder = str(tmp_path_factory.mktemp("coupled"))
    architecture = tiny_model_config(LONG, initializer_range=0.3)
    write_initial_model(architecture, VOCABULARY, STOP, seed=0, folder=folder)

    def engine(coupled, drafted=False, drafting=None):
        scripted = {
            "method": "custom_class",
            "model": "tests.rollout.drafters.ScriptedDrafter",
            "num_speculative_tokens": 4,
        }
        config = RolloutConfig(
            max_num_seqs=64, kv_cache_mb=16, coupled_sampling=coupled, drafting=drafting
        )
        return VLLMEngine(
            folder,
            config,
            max_length=LONG,
            dtype="float32",
            seed=0,
            speculative_config=scripted if drafted else None,
        )

    reference = VersionedReference(build_reference(folder, tmp_path_factory.mktemp("published")))
    always = DraftingConfig(budget="none", max_tokens=4)
    return SimpleNamespace(
        reference=reference,
        plain=engine(True),
        drafted=engine(True, drafted=True),
        ratio_rule=engine(False, drafted=True),
        from_siblings=engine(True, drafting=always),
        ratio_rule_from_siblings=engine(False, drafting=always),
    )


def serve(engines, version):
    for engine in list(vars(engines).values())[1:]:
        engines.reference.serve(engine, version)


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


@slow
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
    serve(engines, 1)
    requests = mixed_requests()
    expected = run_to_end(engines.plain, *requests)
    ScriptedDrafter.script, ScriptedDrafter.num_drafted = (
        getattr(Scripts(requests, expected), script),
        0,
    )
    assert_the_same(run_to_end(engines.drafted, *requests), expected)
    assert (ScriptedDrafter.num_drafted > 0) == (script != "nothing")


@slow
def test_drafts_from_siblings_that_know_the_noise_change_no_token_and_are_accepted(engines):
    serve(engines, 8)
    requests = mixed_requests(num_samples=12, stop_token_ids=())
    expected = run_to_end(engines.plain, *requests)
    engine = engines.from_siblings
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


@slow
@pytest.mark.parametrize("coupled", [True, False])
def test_only_under_coupled_sampling_a_drafter_is_told_the_seed(engines, coupled, monkeypatch):
    """Under the ratio rule a draft that knows the verifier's randomness biases what is sampled."""
    engine = engines.from_siblings if coupled else engines.ratio_rule_from_siblings
    serve(engines, 9)
    told = []
    reader = engine._proposer._reader
    opened = reader.open
    monkeypatch.setattr(
        reader, "open", lambda name, *noise: told.append(noise[0]) or opened(name, *noise)
    )
    run_to_end(engine, make_request("told", num_samples=3, seed=70, max_tokens=4))
    assert told == ([70, 71, 72] if coupled else [None] * 3)


@slow
def test_right_drafts_are_accepted_whole(engines):
    serve(engines, 1)
    requests = mixed_requests(stop_token_ids=())
    expected = run_to_end(engines.plain, *requests)
    ScriptedDrafter.script = Scripts(requests, expected).right
    for request in requests:
        engines.drafted.add(request)
    count = 0
    while engines.drafted.has_work():
        engines.drafted.step()
        count += 1
    # a prompt and its first token, then four drafted tokens and one more a step
    assert count <= 2 + BUDGET // 5 + 1


@slow
def test_under_the_ratio_rule_drafts_change_the_tokens(engines):
    """Else the tests above could not fail."""
    serve(engines, 1)
    requests = mixed_requests()[:1]
    ScriptedDrafter.script = lambda tokens: []
    expected = run_to_end(engines.ratio_rule, *requests)
    ScriptedDrafter.script = Scripts(requests, expected).sometimes_right
    found = run_to_end(engines.ratio_rule, *requests)
    with pytest.raises(AssertionError):
        assert_the_same(found, expected)


@slow
def test_neither_the_batch_nor_turns_nor_interrupts_nor_another_worker_change_a_sample(engines):
    serve(engines, 2)
    requests = mixed_requests()
    expected = run_to_end(engines.plain, *requests)
    ScriptedDrafter.script = Scripts(requests, expected).sometimes_right
    whole = {request.request_id: request for request in requests}
    for name, request in whole.items():
        assert_the_same(run_to_end(engines.plain, request), {name: expected[name]})
    workers, num_segments = [engines.drafted, engines.plain], 0
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


@slow
def test_after_an_update_samples_go_on_as_the_new_weights_say(engines):
    serve(engines, 3)
    requests = mixed_requests(stop_token_ids=())
    before = run_to_end(engines.plain, *requests)
    ScriptedDrafter.script = Scripts(requests, before).sometimes_right
    for request in requests:
        engines.drafted.add(request)
    steps(engines.drafted, 5)
    serve(engines, 4)
    results = {}
    while engines.drafted.has_work():
        results |= {r.request_id: r.completions for r in engines.drafted.step()}
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
            (continued,) = run_to_end(engines.plain, rest)["rest"]
            assert found.token_ids[switch:].tolist() == continued.token_ids.tolist()


@slow
def test_greedy_samples_are_those_of_vllm_and_seeds_make_others_differ(engines):
    serve(engines, 5)
    ScriptedDrafter.script = lambda tokens: []
    greedy = make_request("greedy", temperature=0.0, num_samples=2, max_tokens=BUDGET)
    expected = run_to_end(engines.ratio_rule, greedy)
    assert_the_same(run_to_end(engines.plain, greedy), expected)
    request = make_request("random", num_samples=8, max_tokens=BUDGET, stop_token_ids=())
    samples = [c.token_ids.tolist() for c in run_to_end(engines.plain, request)["random"]]
    assert len(set(map(tuple, samples))) == 8


@slow
def test_an_engine_that_samples_coupled_scores_as_any_other(engines):
    serve(engines, 7)
    request = make_request("scored", num_samples=3, max_tokens=9)
    completions = run_to_end(engines.plain, request)["scored"]
    asked = replace(request, partial=completions, scores=True)
    scores = run_to_end(engines.drafted, asked)["scored"]
    assert_the_same({"scored": scores}, {"scored": completions})


@slow
@pytest.mark.parametrize("drafts", [True, False])
def test_tokens_are_distributed_as_the_model_says(engines, drafts):
    serve(engines, 6)
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
    results = run_to_end(engines.drafted if drafts else engines.plain, *requests)
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


def numbers(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fake_runner(seeds, positions):
    """What the sampler reads of vLLM's model runner."""
    names = [f"request {number}" for number in range(len(seeds))]
    requests = {
        name: SimpleNamespace(sampling_params=SimpleNamespace(seed=seed))
        for name, seed in zip(names, seeds, strict=True)
    }
    batch = SimpleNamespace(req_ids=names, num_tokens_no_spec=np.array(positions, np.int32))
    return SimpleNamespace(
        sampler=SimpleNamespace(logprobs_mode="processed_logprobs"),
        requests=requests,
        input_batch=batch,
    )


def metadata_of(temperatures, **changes):
    temperature = torch.tensor(temperatures)
    nothing = torch.zeros(len(temperatures))
    settings = {
        "temperature": temperature,
        "all_greedy": bool((temperature == 0).all()),
        "all_random": bool((temperature > 0).all()),
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": 0,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": nothing,
        "presence_penalties": nothing,
        "repetition_penalties": nothing,
        "output_token_ids": [],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**settings | changes)


def drafts_of(counts, drafted):
    """vLLM's description of drafts: ``counts`` tokens of each request, one after the other."""
    counts = torch.tensor(counts)
    rows = torch.arange(int(counts.sum()) + len(counts))
    last = (counts + 1).cumsum(0) - 1
    return SpecDecodeMetadata(
        draft_token_ids=torch.tensor(drafted, dtype=torch.int32),
        num_draft_tokens=counts.tolist(),
        cu_num_draft_tokens=counts.cumsum(0),
        cu_num_sampled_tokens=last + 1,
        target_logits_indices=rows[~torch.isin(rows, last)],
        bonus_logits_indices=last,
        logits_indices=rows,
    )


def by_hand(logits, seed, position, temperature):
    """The token of one row of logits."""
    if temperature == 0:
        return int(logits.argmax())
    stream = noise.position_streams(np.array([seed]), np.array([position]))
    scores = logits.numpy().astype(np.float32) / np.float32(temperature)
    return int((scores + noise.gumbel(stream, np.arange(len(logits)))).argmax())


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5), st.data())
def test_a_draft_is_kept_up_to_the_first_token_that_is_not_sampled(drafts, data):
    """Of each request: so many drafted tokens, of which so many are right."""
    seeds = data.draw(st.lists(st.integers(0, 2**33), min_size=len(drafts), max_size=len(drafts)))
    positions = [7 * number for number in range(len(drafts))]
    temperatures = [data.draw(st.sampled_from([0.0, 0.6, 1.0])) for _ in drafts]
    counts = [count for count, _ in drafts]
    logits = numbers((sum(counts) + len(drafts), 11), seed=sum(seeds) % 1000)
    expected, drafted, row = [], [], 0
    for index, (count, num_right) in enumerate(drafts):
        sampled = [
            by_hand(logits[row + i], seeds[index], positions[index] + i, temperatures[index])
            for i in range(count + 1)
        ]
        kept = min(count, num_right)
        drafted += [t if i != kept else (t + 1) % 11 for i, t in enumerate(sampled[:count])]
        expected.append(sampled[: kept + 1] + [-1] * (max(counts) - kept))
        row += count + 1
    metadata = drafts_of(counts, drafted)
    verify = CoupledVerifier(CoupledSampler(fake_runner(seeds, positions)))
    found = verify(metadata, None, logits.clone(), metadata_of(temperatures))
    assert found.sampled_token_ids.tolist() == expected
    assert found.sampled_token_ids.dtype == torch.int32
    assert len(found.logprobs_tensors.logprobs) == found.sampled_token_ids.numel()


def test_noise_in_parts_is_the_noise_of_all(monkeypatch):
    logits, rows = numbers((9, 50), seed=1), torch.arange(9)
    greedy = rows == 4
    whole = noisy_argmax(logits, rows, rows + 3, greedy)
    monkeypatch.setattr(coupled_sampling, "NOISE_IN_CACHE", 100)
    assert noisy_argmax(logits, rows, rows + 3, greedy).tolist() == whole.tolist()
    monkeypatch.setattr(coupled_sampling, "NOISE_IN_CACHE", 1)
    assert noisy_argmax(logits, rows, rows + 3, greedy).tolist() == whole.tolist()
    assert whole[4] == logits[4].argmax()


def test_a_token_without_mass_is_never_sampled():
    logits = torch.full((1000, 40), -torch.inf)
    logits[:, 17] = -60.0
    rows = torch.arange(1000)
    assert set(noisy_argmax(logits, rows, rows, rows < 0).tolist()) == {17}


def test_the_noise_of_torch_is_that_of_numpy():
    streams, tokens = np.arange(-5, 5)[:, None] * 2**59, np.arange(1000)
    found = coupled_sampling.gumbel(torch.from_numpy(streams), torch.from_numpy(tokens))
    np.testing.assert_allclose(found.numpy(), noise.gumbel(streams, tokens), rtol=1e-12)


def test_a_request_without_a_seed_is_refused():
    sampler = CoupledSampler(fake_runner([None], [3]))
    with pytest.raises(AssertionError, match="seed of every request"):
        sampler(numbers((1, 11), seed=0), metadata_of([1.0]))


def test_what_verifying_does_not_know_is_refused():
    sampler = CoupledSampler(fake_runner([1], [3]))
    with pytest.raises(AssertionError):
        sampler(numbers((1, 11), seed=0), metadata_of([1.0], no_penalties=False))
