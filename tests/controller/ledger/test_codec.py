"""A group as bytes: everything comes back, and no damage goes unnoticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.vocabulary import (
    NOT_ROUTED,
    Group,
    Trajectory,
    VersionSpan,
    WeightVersion,
)
from paceline.controller.ledger.codec import decode_group, encode_group
from paceline.controller.ledger.events import LedgerError
from tests.controller.builders import make_group, make_prompt


@st.composite
def trajectories(draw, is_taught, is_drafted=False, is_routed=False):
    length = draw(st.integers(1, 30))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    cut = draw(st.integers(0, length))
    spans = ((3, 0, cut), (2**40, cut, length))
    return Trajectory(
        token_ids=generator.integers(0, 2**31, length).astype(np.int32),
        loss_mask=generator.random(length) < 0.5,
        logprobs=generator.normal(size=length).astype(np.float32),
        versions=tuple(VersionSpan(WeightVersion(v), a, b) for v, a, b in spans if a < b),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        reward=draw(st.floats(allow_nan=False)),
        text=draw(st.text()),
        teacher_logprobs=generator.normal(size=length).astype(np.float32) if is_taught else None,
        draft_sources=generator.integers(0, 3, length).astype(np.uint8) if is_drafted else None,
        routed_experts=generator.integers(-1, 128, (length, 3, 2)).astype(np.int16)
        if is_routed
        else None,
    )


@given(
    st.tuples(st.booleans(), st.booleans(), st.booleans()).flatmap(
        lambda flags: st.lists(trajectories(*flags), min_size=1, max_size=5)
    ),
    st.none() | st.text(),
)
def test_a_group_comes_back_as_it_was(samples, fault):
    group = Group(7, make_prompt(7), tuple(samples), fault)
    again = decode_group(encode_group(group), make_prompt(7), 7)
    assert (again.group_id, again.prompt, again.fault) == (7, group.prompt, fault)
    for mine, theirs in zip(again.trajectories, group.trajectories, strict=True):
        for name in (
            *("token_ids", "loss_mask", "logprobs"),
            *("teacher_logprobs", "draft_sources", "routed_experts"),
        ):
            if getattr(theirs, name) is None:
                assert getattr(mine, name) is None
                continue
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
            assert getattr(mine, name).dtype == getattr(theirs, name).dtype
        for name in ("versions", "finish_reason", "reward", "text"):
            assert getattr(mine, name) == getattr(theirs, name)


def test_a_sample_finished_before_drafting_was_on_has_no_drafted_tokens():
    group = make_group(1)
    first, *others = group.trajectories
    sources = np.ones(len(first.token_ids), np.uint8)
    mixed = replace(group, trajectories=(replace(first, draft_sources=sources), *others))
    again = decode_group(encode_group(mixed), group.prompt, 1)
    assert again.trajectories[0].draft_sources.all()
    assert others and not any(t.draft_sources.any() for t in again.trajectories[1:])


def test_a_sample_finished_before_routing_was_recorded_has_unknown_experts():
    group = make_group(1)
    first, *others = group.trajectories
    experts = np.ones((len(first.token_ids), 2, 1), np.int16)
    mixed = replace(group, trajectories=(replace(first, routed_experts=experts), *others))
    again = decode_group(encode_group(mixed), group.prompt, 1)
    assert (again.trajectories[0].routed_experts == 1).all()
    assert others
    for trajectory in again.trajectories[1:]:
        assert trajectory.routed_experts.shape == (len(trajectory.token_ids), 2, 1)
        assert (trajectory.routed_experts == NOT_ROUTED).all()


def test_every_flipped_byte_and_every_missing_end_is_noticed():
    content = encode_group(make_group(1))
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1
        with pytest.raises(LedgerError, match="group 1"):
            decode_group(bytes(damaged), make_prompt(1), 1)
        with pytest.raises(LedgerError, match="group 1"):
            decode_group(content[:index], make_prompt(1), 1)
