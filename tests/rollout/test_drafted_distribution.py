"""With drafts, what is sampled is still distributed as the model says; without the patch it is not.

Groundwork for speculative decoding: no engine of a run drafts yet.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vllm
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_only

from paceline.learner.model import write_initial_model
from paceline.rollout.vllm_engine import start_engine
from paceline.rollout.vllm_patches import (
    expand_batch_to_tokens,
    give_drafts_their_sampling_constraints,
    keep_cpu_linear_weights,
    let_everybody_draft_nothing,
)
from tests.rollout.conftest import MAX_LENGTH, STOP, build_reference, tiny_model_config
from tests.rollout.drafters import FixedDrafter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the defect is the CPU's"),
]

PROMPT = (5, 9, 3)
NUM_SAMPLES = 3000
SUSPICIOUS = 1e-4
"""A probability under which a test of a right sampler fails once in ten thousand runs."""


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """An engine that is drafted for, with a peaked model, and the model itself."""
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = lambda: None
    folder = str(tmp_path_factory.mktemp("peaked"))
    write_initial_model(tiny_model_config(initializer_range=0.35), 128, STOP, seed=2, folder=folder)
    keep_cpu_linear_weights()
    engine = start_engine(
        vllm.EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=MAX_LENGTH,
            max_num_seqs=256,
            enforce_eager=True,
            enable_chunked_prefill=False,
            kv_cache_memory_bytes=32 << 20,
            logprobs_mode="processed_logprobs",
            async_scheduling=False,
            disable_log_stats=True,
            speculative_config={
                "method": "custom_class",
                "model": "tests.rollout.drafters.FixedDrafter",
                "num_speculative_tokens": 2,
            },
        )
    )
    return engine, build_reference(folder, tmp_path_factory.mktemp("unused"))


VLLMS_OWN_EXPAND = rejection_sampler.expand_batch_to_tokens


def second_tokens(engine, settings):
    """Second tokens of many completions of one prompt, one array for each sampling setting."""
    names = {}
    for index in range(NUM_SAMPLES * len(settings)):
        parameters = vllm.SamplingParams(
            max_tokens=2,
            ignore_eos=True,
            seed=index,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **settings[index % len(settings)],
        )
        name = f"{id(names)}-{index}"
        names[name] = index % len(settings)
        engine.add_request(name, TokensPrompt(prompt_token_ids=list(PROMPT)), parameters)
    found = [[] for _ in settings]
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[names[output.request_id]].append(output.outputs[0].token_ids[1])
    return [np.array(tokens) for tokens in found]


def constrained(logits, temperature, top_k=0, top_p=1.0):
    """The distribution that is to be sampled from: float64 [..., V]."""
    logits = logits.double() / temperature
    if top_k:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)


@torch.no_grad()
def exact_second(model, **setting):
    """Probability of each second token, summed over all first ones: float64 [V]."""
    first = constrained(model(torch.tensor([PROMPT])).logits[0, -1], **setting)
    first = first / first.sum()
    continued = torch.tensor([[*PROMPT, token] for token in range(128)])
    second = constrained(model(continued).logits[:, -1], **setting)
    return (first[:, None] * second / second.sum(-1, keepdim=True)).sum(0)


def chi_square_probability(tokens, exact):
    """How often a right sampler is at least this far off; rare tokens are counted together."""
    expected = exact.numpy() * len(tokens)
    counts = np.bincount(tokens, minlength=len(exact)).astype(float)
    common = expected >= 8
    assert counts[expected < 1e-9].sum() == 0 or not (expected < 1e-9).any(), "an impossible token"
    expected = np.append(expected[common], expected[~common].sum())
    counts = np.append(counts[common], counts[~common].sum())
    inside = expected > 0
    statistic = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    half = torch.tensor([(inside.sum() - 1) / 2.0, statistic / 2.0], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
]


def draft_likely_token(model):
    """Draft the token that is most likely to come second: accepted often, never always."""
    likely = int(exact_second(model, temperature=1.0).argmax())
    FixedDrafter.tokens, FixedDrafter.num_drafted = [likely, likely], 0


def test_mixed_settings_in_one_batch_are_sampled_as_the_model_says(drafting):
    engine, reference = drafting
    give_drafts_their_sampling_constraints()
    draft_likely_token(reference.model)
    found = second_tokens(engine, SETTINGS)
    assert FixedDrafter.num_drafted >= NUM_SAMPLES * len(SETTINGS), "nothing was drafted"
    for setting, tokens in zip(SETTINGS, found, strict=True):
        exact = exact_second(reference.model, **setting)
        assert chi_square_probability(tokens, exact) > SUSPICIOUS, setting


def test_without_the_patch_the_distribution_is_wrong(drafting, monkeypatch):
    """Fails once vLLM gives drafts their temperatures by itself: then the patch can go."""
    engine, reference = drafting
    draft_likely_token(reference.model)
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", VLLMS_OWN_EXPAND)
    # memory that is not initialised holds what lay there: fill it with what hurts
    plain = torch.Tensor.new_empty

    def filled(self, *size, **named):
        return plain(self, *size, **named).fill_(3.0)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    (tokens,) = second_tokens(engine, [{"temperature": 0.6}])
    monkeypatch.undo()
    exact = exact_second(reference.model, temperature=0.6)
    assert chi_square_probability(tokens, exact) < SUSPICIOUS


def test_steps_without_any_draft_are_sampled_too(drafting):
    engine, reference = drafting
    give_drafts_their_sampling_constraints()
    let_everybody_draft_nothing()
    FixedDrafter.tokens = []
    setting = {"temperature": 0.8, "top_k": 5}
    (tokens,) = second_tokens(engine, [setting])
    exact = exact_second(reference.model, **setting)
    assert chi_square_probability(tokens, exact) > SUSPICIOUS


def test_vllm_as_it_comes_ends_where_nothing_is_drafted():
    """Fails once it does not: then the patch can go."""
    nothing = torch.zeros(0, 8)
    with pytest.raises(RuntimeError, match="reduction dim"):
        apply_top_k_only(nothing, torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_request_has_its_value_for_every_drafted_token(dtype):
    values = torch.tensor([0, 7, 5], dtype=dtype)
    found = expand_batch_to_tokens(
        values, torch.tensor([2, 2, 5], dtype=torch.int32), 5, replace_from=0, replace_to=1
    )
    assert found.tolist() == [1, 1, 5, 5, 5]
    assert found.dtype == dtype
