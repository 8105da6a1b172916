"""Above temperature 0 what comes out is random: held against the model's probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from paceline.configs.vocabulary import RolloutRequest, SamplingParameters
from paceline.controller.verify.checks.distribution import ChiSquare, even_each
from paceline.controller.verify.checks.evidence import Evidence, Sample, examine
from paceline.controller.verify.checks.greedy import undrafted_texts
from paceline.controller.verify.checks.judging import (
    TIED_LOGITS,
    describe,
    distribution_faults,
    drafts_accepted,
    joined,
    largest_error,
    logprob_faults,
    sampled_evenly,
)
from paceline.controller.verify.drafters import ModelDrafter, least_likely, likeliest, mixed
from paceline.controller.verify.result import CheckResult
from paceline.controller.verify.subject import Drafter, Run, Subject, joined_runs

ALONE = tuple(SamplingParameters(temperature) for temperature in (0.6, 0.8, 1.0))
"""Ways of sampling that have a batch to themselves."""

TOGETHER = (
    SamplingParameters(0.6),
    SamplingParameters(1.0),
    SamplingParameters(0.8, top_k=5),
    SamplingParameters(1.0, top_p=0.8),
    SamplingParameters(0.7, top_p=0.9, top_k=8),
    SamplingParameters(0.0),
)
"""Ways of sampling that share one batch."""

SWAP_ROUNDS = 3
"""How often every prompt is sampled while weights are swapped: more than fit a batch, so that some
begin under new weights."""

NUM_STOPS = 3
"""Tokens that end a sample, where they may."""

SWAPS = (3, 7)
"""Engine steps after which other weights are loaded into the middle of what is being sampled: of
samples that cannot be over by then, were every draft accepted."""


def sampled_distribution(subject: Subject) -> Iterator[CheckResult]:
    """Check that tokens are distributed as the model says, whatever is drafted."""
    for drafter in (subject.undrafted, subject.ours, *adversaries(subject)):
        yield from sampled_by(subject, drafter)


def stopped_distribution(subject: Subject) -> Iterator[CheckResult]:
    """Check the same where samples end at stop tokens that drafts go beyond, and that they end."""
    for drafter in (subject.ours, adversaries(subject)[0]):
        sampling = SamplingParameters(
            1.0, max_tokens=subject.size.num_tokens, stop_token_ids=_frequent(subject)
        )
        run = subject.run(drafter, requests_for(subject, sampling))
        evidence = examine(subject.reference, run.samples, subject.generator)
        even = even_each(describe(sampling), joined(evidence, "numbers"))
        comparisons = [even, *drafts_accepted(evidence)]
        ends = sum(not ends_rightly(sample) for sample in run.samples)
        faults = [*run.faults(accepts=True), *distribution_faults(evidence, comparisons)]
        if ends:
            faults.append(f"{ends} of {len(run.samples)} samples end elsewhere than they should")
        yield _result("sampled to stops", run, evidence, comparisons, faults)


def weight_swap(subject: Subject) -> Iterator[CheckResult]:
    """Check that tokens follow the weights that came in the middle of their samples."""
    for drafter in (subject.ours, adversaries(subject)[-1]):
        swaps = {step: version for version, step in enumerate(SWAPS, start=1)}

        def swap(step: int, drafter: Drafter = drafter, swaps: dict[int, int] = swaps) -> None:
            if step in swaps:
                drafter.engine.update_weights(subject.reference.publish(swaps[step]))

        sampling = SamplingParameters(1.0, max_tokens=subject.size.num_tokens)
        subject.run(drafter, requests_for(subject, sampling))  # what ours drafts from
        requests = chain.from_iterable(requests_for(subject, sampling) for _ in range(SWAP_ROUNDS))
        run = subject.run(drafter, list(requests), between=swap)
        drafter.engine.update_weights(subject.reference.publish(0))
        evidence = examine(subject.reference, run.samples, subject.generator, rival=0)
        spans = _by_version(run.samples, evidence)
        comparisons = [even_each(f"version {version}", spans[version]) for version in sorted(spans)]
        comparisons += [*_after_first(spans), *drafts_accepted(evidence)]
        faults = [*run.faults(accepts=True), *distribution_faults(evidence, comparisons)]
        if set(spans) != {0, *swaps.values()}:
            faults.append(f"tokens of versions {sorted(spans)} only: no swap fell into them")
        yield _result("weight swaps", run, evidence, comparisons, faults)


def adversaries(subject: Subject) -> list[Drafter]:
    """Return drafters that know the model: as right, as wrong as can be, and of all kinds."""
    kinds = {"likeliest": likeliest, "least likely": least_likely, "anything": mixed}
    return [
        subject.scripted(name, ModelDrafter(subject.reference, ranks))
        for name, ranks in kinds.items()
    ]


def sampled_by(subject: Subject, drafter: Drafter) -> Iterator[CheckResult]:
    """Check every way of sampling alone, then together, and at last all their tokens as one."""
    batches = [(f"sampled {describe(sampling)}", [sampling]) for sampling in ALONE]
    runs: list[Run] = []
    everything: list[Evidence] = []
    for title, batch in [*batches, ("sampled mixed", TOGETHER)]:
        requests = chain.from_iterable(requests_for(subject, sampling) for sampling in batch)
        run = subject.run(drafter, list(requests))
        evidence = examine(subject.reference, run.samples, subject.generator)
        yield _in_ways(title, run, evidence)
        runs.append(run)
        everything += evidence
    yield _as_one(joined_runs(runs), everything)


def _in_ways(title: str, run: Run, evidence: Sequence[Evidence]) -> CheckResult:
    """Judge a batch, each way of sampling for itself."""
    groups: dict[SamplingParameters, list[Evidence]] = {}
    for sample, each in zip(run.samples, evidence, strict=True):
        groups.setdefault(sample.request.sampling, []).append(each)
    comparisons: list[ChiSquare] = []
    faults = run.faults()
    for way, group in groups.items():
        if way.temperature:
            comparisons += sampled_evenly(describe(way), group)
        elif not_greedy := int((joined(group, "gaps") > TIED_LOGITS).sum()):
            faults.append(f"{not_greedy} tokens at temperature 0 are not the model's likeliest")
    faults += distribution_faults(evidence, comparisons)
    return _result(title, run, evidence, comparisons, faults)


def _as_one(run: Run, evidence: Sequence[Evidence]) -> CheckResult:
    """Judge all tokens above temperature 0: what is a little wrong shows in many of them."""
    drawn = [
        each
        for sample, each in zip(run.samples, evidence, strict=True)
        if sample.request.sampling.temperature
    ]
    comparisons = [*sampled_evenly("all ways", drawn), *drafts_accepted(drawn)]
    faults = [*run.faults(), *distribution_faults(drawn, comparisons)]
    return _result("sampled, as one", run, evidence, comparisons, faults)


def _by_version(samples: Sequence[Sample], evidence: Sequence[Evidence]) -> dict[int, Tensor]:
    """Group the even numbers of all tokens by version."""
    numbers: dict[int, list[Tensor]] = {}
    for sample, each in zip(samples, evidence, strict=True):
        for span in sample.completion.versions:
            numbers.setdefault(span.version, []).append(each.numbers[span.start : span.end])
    return {version: torch.cat(parts) for version, parts in numbers.items()}


def _after_first(spans: dict[int, Tensor]) -> list[ChiSquare]:
    """Judge all tokens of versions that came later, as one."""
    later = [spans[version] for version in spans if version]
    return [even_each("after swaps", torch.cat(later))] if later else []


def requests_for(subject: Subject, sampling: SamplingParameters) -> list[RolloutRequest]:
    """Request samples of all prompts in one way."""
    sampling = replace(sampling, max_tokens=subject.size.num_tokens)
    return [
        subject.request(prompt, sampling, subject.size.num_samples) for prompt in subject.prompts
    ]


def _frequent(subject: Subject) -> tuple[int, ...]:
    """Choose stop tokens that the model often says in greedy texts, and so are often drafted."""
    _, texts = undrafted_texts(subject)
    counts = Counter(chain.from_iterable(texts.values()))
    return tuple(token for token, _ in counts.most_common(NUM_STOPS))


def ends_rightly(sample: Sample) -> bool:
    """Tell whether a stop token is last and the reason, or the budget is used up without one."""
    tokens, sampling = sample.completion.token_ids.tolist(), sample.request.sampling
    places = [place for place, token in enumerate(tokens) if token in sampling.stop_token_ids]
    if places:
        return places == [len(tokens) - 1] and sample.completion.finish_reason == "stop"
    return len(tokens) == sampling.max_tokens and sample.completion.finish_reason == "length"


def _result(
    check: str,
    run: Run,
    evidence: Sequence[Evidence],
    comparisons: Sequence[ChiSquare],
    faults: Sequence[str],
) -> CheckResult:
    return CheckResult(
        check,
        run.drafter.name,
        f"tokens of {len(run.samples)} samples, and their log-probabilities, with the model's",
        run.num_tokens,
        run.num_drafted,
        run.num_accepted,
        comparisons,
        largest_error(evidence),
        [*faults, *logprob_faults(evidence)],
    )
