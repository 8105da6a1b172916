"""A group as bytes: everything comes back, and no damage goes unnoticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.vocabulary import (
    NOT_ROUTED,
    Completion,
    Group,
    Sample,
    VersionSpan,
    WeightVersion,
)
from paceline.controller.ledger.codec import decode_group, encode_group
from paceline.controller.ledger.events import LedgerError
from tests.controller.builders import make_group, make_prompt

ARRAYS = {"token_ids", "logprobs", "teacher_logprobs", "draft_sources", "routed_experts"}


@st.composite
def samples_of(draw, is_taught, is_drafted=False, is_routed=False):
    length = draw(st.integers(1, 30))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    cut = draw(st.integers(0, length))
    spans = ((3, 0, cut), (2**40, cut, length))
    num_prompt = len(make_prompt(7).token_ids)
    completion = Completion(
        token_ids=generator.integers(0, 2**31, length).astype(np.int32),
        logprobs=generator.normal(size=length).astype(np.float32),
        versions=tuple(VersionSpan(WeightVersion(v), a, b) for v, a, b in spans if a < b),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        draft_sources=generator.integers(0, 3, length).astype(np.uint8) if is_drafted else None,
        routed_experts=generator.integers(-1, 128, (num_prompt + length, 3, 2)).astype(np.int16)
        if is_routed
        else None,
    )
    return Sample(
        completion,
        reward=draw(st.floats(allow_nan=False)),
        text=draw(st.text()),
        teacher_logprobs=generator.normal(size=length).astype(np.float32) if is_taught else None,
    )


@given(
    st.tuples(st.booleans(), st.booleans(), st.booleans()).flatmap(
        lambda flags: st.lists(samples_of(*flags), min_size=1, max_size=5)
    ),
    st.none() | st.text(),
)
def test_a_group_comes_back_as_it_was(samples, fault):
    group = Group(7, make_prompt(7), tuple(samples), fault)
    again = decode_group(encode_group(group), make_prompt(7), 7)
    assert (again.group_id, again.prompt, again.fault) == (7, group.prompt, fault)
    for mine, theirs in zip(again.samples, group.samples, strict=True):
        found, expected = (vars(sample) | vars(sample.completion) for sample in (mine, theirs))
        for name in ARRAYS:
            if expected[name] is None:
                assert found[name] is None
                continue
            np.testing.assert_array_equal(found[name], expected[name])
            assert found[name].dtype == expected[name].dtype
        for name in found.keys() - ARRAYS - {"completion"}:
            assert found[name] == expected[name]


def test_a_sample_finished_before_drafting_was_on_has_no_drafted_tokens():
    group = make_group(1)
    first, *others = group.samples
    sources = np.ones(first.num_tokens, np.uint8)
    mixed = replace(group, samples=(recorded(first, draft_sources=sources), *others))
    again = decode_group(encode_group(mixed), group.prompt, 1)
    first, *others = (sample.completion.draft_sources for sample in again.samples)
    assert first.all()
    assert others and not any(sources.any() for sources in others)


def test_a_sample_finished_before_routing_was_recorded_has_unknown_experts():
    group = make_group(1)
    first, *others = group.samples
    num_tokens = len(group.prompt.token_ids) + first.num_tokens
    experts = np.ones((num_tokens, 2, 1), np.int16)
    mixed = replace(group, samples=(recorded(first, routed_experts=experts), *others))
    again = decode_group(encode_group(mixed), group.prompt, 1)
    first, *others = (sample.completion.routed_experts for sample in again.samples)
    assert (first == 1).all()
    assert others
    for experts in others:
        assert experts.shape == (num_tokens, 2, 1)
        assert (experts == NOT_ROUTED).all()


def recorded(sample, **arrays):
    return replace(sample, completion=replace(sample.completion, **arrays))


def test_a_prompt_whose_tokens_changed_is_not_continued():
    content = encode_group(make_group(1))
    retokenised = replace(make_prompt(1), token_ids=(1, 2, 4))
    with pytest.raises(LedgerError, match="group 1 was sampled from other tokens of prompt p1"):
        decode_group(content, retokenised, 1)


def test_every_flipped_byte_and_every_missing_end_is_noticed():
    content = encode_group(make_group(1))
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1
        with pytest.raises(LedgerError, match="group 1"):
            decode_group(bytes(damaged), make_prompt(1), 1)
        with pytest.raises(LedgerError, match="group 1"):
            decode_group(content[:index], make_prompt(1), 1)
