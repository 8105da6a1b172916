"""What verifying drafts needs of vLLM, and how the tests of this folder judge what is sampled.

That vLLM, so patched, samples what the model says under any draft is for ``paceline verify
speculation`` to show, and that it would show the contrary: ``tests/controller/verify``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_only

from paceline.configs.vocabulary import SamplingParameters
from paceline.controller.verify.checks import distribution
from paceline.rollout.vllm_patches import expand_batch_to_tokens

SUSPICIOUS = 1e-4
"""A probability under which a test of a right sampler fails once in ten thousand runs."""


def constrained(logits, **setting):
    """The distribution that is to be sampled from: float64 [..., V]."""
    return distribution.constrained(logits, SamplingParameters(**setting))


def chi_square_probability(tokens, exact):
    """How often a right sampler is at least this far off; rare tokens are counted together."""
    expected = exact.numpy() * len(tokens)
    counts = np.bincount(tokens, minlength=len(expected)).astype(float)
    common = expected >= 8
    assert counts[expected < 1e-9].sum() == 0 or not (expected < 1e-9).any(), "an impossible token"
    expected = np.append(expected[common], expected[~common].sum())
    counts = np.append(counts[common], counts[~common].sum())
    inside = expected > 0
    statistic = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    return distribution.beyond(statistic, int(inside.sum()) - 1)


def test_the_judge_accepts_a_right_sampler_and_no_other():
    exact = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    dice = np.random.default_rng(0)
    assert chi_square_probability(dice.choice(4, 4000, p=exact.numpy()), exact) > 0.01
    assert chi_square_probability(dice.choice(4, 4000, p=[0.45, 0.35, 0.15, 0.05]), exact) < 1e-6


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
