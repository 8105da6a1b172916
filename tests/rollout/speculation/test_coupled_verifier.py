"""The coupled sampler and verifier without an engine: tokens are those worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from paceline.rollout import coupled_sampling
from paceline.rollout.coupled_sampling import CoupledSampler, CoupledVerifier, noisy_argmax
from paceline.spec import noise


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
