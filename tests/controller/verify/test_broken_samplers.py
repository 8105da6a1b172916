"""Samplers that are wrong in the ways samplers of drafts are wrong do not pass."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.sample import rejection_sampler

from paceline.controller.verify.checks.greedy import greedy_tokens
from paceline.controller.verify.checks.sampling import adversaries, sampled_by

pytestmark = pytest.mark.slow

VLLMS_OWN_EXPAND = rejection_sampler.expand_batch_to_tokens


def accept_everything(drafts, num_drafts, longest, cumulative, _, logits, bonus, *more, **named):
    """In place of ``rejection_sample``: every draft, then the token after it."""
    tokens = torch.full((len(num_drafts), longest + 1), -1, dtype=torch.int32)
    for row, (draft, last) in enumerate(zip(drafts.split(num_drafts), bonus, strict=True)):
        tokens[row, : len(draft)] = draft
        tokens[row, len(draft)] = last
    return tokens


def replace_by_anything(longest, num_drafts, cumulative, drafts, _, probabilities, *more):
    """In place of ``sample_recovered_tokens``: the rejected draft may come again."""
    return torch.multinomial(probabilities, 1)[:, 0].to(drafts.dtype)


def doubt_by_a_tenth(rejection_sample):
    """A sampler that takes the temperature of drafted places to be a tenth higher than it is."""

    def wrong(*arguments, **named):
        drafts, num_drafts, longest, cumulative, _, logits, *more = arguments
        return rejection_sample(
            drafts, num_drafts, longest, cumulative, _, logits / 1.1, *more, **named
        )

    return wrong


@pytest.fixture
def drafters(subject):
    return {drafter.name: drafter for drafter in adversaries(subject)}


def faults_of(subject, drafter):
    """What is wrong with samples at one temperature, in a batch of their own."""
    return next(sampled_by(subject, drafter)).faults


def faults_of_all(subject, drafter):
    """What is wrong with samples of all kinds, looked at as one."""
    *_, as_one = sampled_by(subject, drafter)
    return as_one.faults


def test_a_right_sampler_passes(subject, drafters):
    assert faults_of(subject, drafters["likeliest"]) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the defect is the CPU's")
def test_without_the_patch_the_distribution_is_wrong(subject, drafters, monkeypatch):
    """Fails once vLLM gives drafts their temperatures by itself: then the patch can go."""
    assert VLLMS_OWN_EXPAND.__module__ == rejection_sampler.__name__
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", VLLMS_OWN_EXPAND)
    # memory that is not initialised holds what lay there: fill it with what hurts
    plain = torch.Tensor.new_empty

    def filled(self, *size, **named):
        return plain(self, *size, **named).fill_(3.0)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    assert any("chi-square" in fault for fault in faults_of(subject, drafters["likeliest"]))


@pytest.mark.parametrize("name", ["likeliest", "least likely", "anything"])
def test_accepting_every_draft_is_found(subject, drafters, monkeypatch, name):
    monkeypatch.setattr(rejection_sampler, "rejection_sample", accept_everything)
    assert any("chi-square" in fault for fault in faults_of(subject, drafters[name]))


def test_accepting_every_draft_is_found_in_greedy_texts(subject, monkeypatch):
    monkeypatch.setattr(rejection_sampler, "rejection_sample", accept_everything)
    wrong = {result.drafter: result.faults for result in greedy_tokens(subject)}
    assert wrong["none"] == [], "which is not drafted for"
    assert any("not the undrafted engine's" in fault for fault in wrong["always wrong"])


@pytest.mark.parametrize("name", ["likeliest", "anything"])
def test_sampling_a_rejected_draft_again_is_found(subject, drafters, monkeypatch, name):
    monkeypatch.setattr(rejection_sampler, "sample_recovered_tokens", replace_by_anything)
    assert any("chi-square" in fault for fault in faults_of_all(subject, drafters[name]))


def test_a_temperature_that_is_a_tenth_too_high_in_drafts_is_found(subject, drafters, monkeypatch):
    right = rejection_sampler.rejection_sample
    monkeypatch.setattr(rejection_sampler, "rejection_sample", doubt_by_a_tenth(right))
    assert any("chi-square" in fault for fault in faults_of_all(subject, drafters["likeliest"]))
