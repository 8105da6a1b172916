"""Drafting as it stands passes every check; a check that verified nothing, or found one, fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paceline.configs.vocabulary import Completion, RolloutRequest, SamplingParameters, VersionSpan
from paceline.controller.verify.checks import sampling as sampling_checks
from paceline.controller.verify.checks.coupled import coupled_tokens
from paceline.controller.verify.checks.evidence import Sample, examine
from paceline.controller.verify.checks.greedy import greedy_tokens, stops, undrafted_texts
from paceline.controller.verify.checks.judging import distribution_faults, logprob_faults
from paceline.controller.verify.checks.sampling import ends_rightly, sampled_by, weight_swap
from paceline.controller.verify.drafters import nothing
from paceline.controller.verify.speculation import CHECKS
from paceline.controller.verify.tiny_model import Language

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_drafting_as_it_stands_passes(subject, check):
    results = list(check(subject))
    assert [fault for result in results for fault in result.faults] == []
    drafted = [result for result in results if result.drafter != "none"]
    assert drafted
    assert all(result.num_drafted for result in drafted)
    assert any(result.num_accepted for result in drafted if result.drafter.startswith("ours"))


def test_the_model_learned_its_language_and_repeats_no_single_token(subject):
    language = Language.of_seed(0)
    contexts = [prompt[:2] for prompt in subject.prompts]
    subject.reference.load(0)
    found = subject.reference.next_logits(contexts).softmax(-1)[:, : language.transitions.shape[-1]]
    told = [language.transitions[context[0] - found.shape[1], context[1]] for context in contexts]
    distance = sum(
        float((row - right).abs().sum()) / 2 for row, right in zip(found, told, strict=True)
    )
    assert distance / len(contexts) < 0.3
    _, texts = undrafted_texts(subject)
    assert np.median([len(set(text[:24])) for text in texts.values()]) >= 6


def test_a_check_in_which_nothing_is_drafted_fails_for_that_alone(subject):
    """For steps without any draft are sampled rightly too, by the sampler of drafts."""
    for result in sampled_by(subject, subject.scripted("nobody", nothing)):
        assert result.num_tokens
        assert result.faults == ["nothing was drafted: nothing was verified"]


def test_tokens_that_depend_on_drafts_are_not_coupled(subject, monkeypatch):
    def uncoupled(coupled_sampling, speculative_config=None, drafting=None):
        if speculative_config:
            return subject.scripted("any", nothing).engine
        return (subject.ours if drafting else subject.undrafted).engine

    monkeypatch.setattr(subject, "engine", uncoupled)
    results = list(coupled_tokens(subject))
    assert len(results) == 2
    assert all("not the undrafted ones" in result.faults[0] for result in results)


def test_an_engine_of_ours_that_does_not_draft_fails_every_check_that_it_drafts_in(
    subject, monkeypatch
):
    monkeypatch.setattr(subject, "ours", replace(subject.undrafted, name="ours", drafts=True))
    for check in (greedy_tokens, stops, weight_swap):
        (ours,) = (result for result in check(subject) if result.drafter.startswith("ours"))
        assert not ours.passed


def test_log_probabilities_and_tokens_that_are_not_the_models_are_found(subject):
    sampling = SamplingParameters(0.8, top_k=3, max_tokens=24)
    run = subject.run(subject.ours, [subject.request(subject.prompts[0], sampling, 4)])
    assert logprob_faults(examine(subject.reference, run.samples, subject.generator)) == []
    sample = run.samples[0]
    off = replace(sample.completion, logprobs=sample.completion.logprobs + np.float32(0.01))
    evidence = examine(subject.reference, [replace(sample, completion=off)], subject.generator)
    assert "24 of 24 log-probabilities" in logprob_faults(evidence)[0]
    other = sample.completion.token_ids.copy()
    logits = subject.reference.next_logits([[*sample.request.prompt_token_ids, *other[:-1]]])
    other[-1] = logits.argmin()
    wrong = replace(sample, completion=replace(sample.completion, token_ids=other))
    evidence = examine(subject.reference, [wrong], subject.generator)
    assert "1 tokens that their sampling settings forbid" in distribution_faults(evidence, [])


def test_weights_that_are_not_those_announced_are_found(subject, monkeypatch):
    publish = subject.reference.publish
    monkeypatch.setattr(
        subject.reference, "publish", lambda v: replace(publish(0), version=v) if v else publish(0)
    )
    faults = [fault for result in weight_swap(subject) for fault in result.faults]
    assert any(fault.startswith("after swaps: chi-square") for fault in faults)
    assert any("log-probabilities" in fault for fault in faults)


def test_attention_to_keys_of_older_weights_is_found(subject, monkeypatch):
    monkeypatch.setattr(subject.ours.engine, "_on_update", "keep")
    ours = next(weight_swap(subject))
    assert not ours.passed


def test_a_sample_ends_at_its_first_stop_token_or_with_its_budget():
    sampling = SamplingParameters(1.0, max_tokens=3, stop_token_ids=(7,))
    request = RolloutRequest("r", (1,), sampling, 1, 0)

    def ends(tokens, reason):
        spans = (VersionSpan(0, 0, len(tokens)),)
        logprobs = np.zeros(len(tokens), np.float32)
        completion = Completion(np.array(tokens, np.int32), logprobs, spans, reason)
        return ends_rightly(Sample(request, completion, np.full(len(tokens), -1)))

    assert ends([1, 7], "stop")
    assert ends([1, 2, 3], "length")
    assert not ends([7, 2, 7], "stop"), "something came out after a stop token"
    assert not ends([1, 7], "length")
    assert not ends([1, 2], "length")
    assert not ends([1, 2, 3, 4], "length")


def test_all_temperatures_the_constraints_and_greedy_share_a_batch():
    temperatures = {sampling.temperature for sampling in sampling_checks.TOGETHER}
    assert {0.0, 0.6, 0.8, 1.0} <= temperatures
    assert any(sampling.top_k for sampling in sampling_checks.TOGETHER)
    assert any(sampling.top_p < 1 for sampling in sampling_checks.TOGETHER)
    assert [sampling.temperature for sampling in sampling_checks.ALONE] == [0.6, 0.8, 1.0]
