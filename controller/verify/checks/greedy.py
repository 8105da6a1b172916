"""At temperature 0 one text is right: it comes out whatever is drafted, and ends where asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from paceline.configs.vocabulary import RolloutRequest, SamplingParameters
from paceline.controller.verify.checks.evidence import Evidence, Sample, examine
from paceline.controller.verify.checks.judging import TIED_LOGITS, largest_error, logprob_faults
from paceline.controller.verify.drafters import (
    NUM_DRAFTED,
    ModelDrafter,
    ScriptedDrafter,
    Told,
    likeliest,
)
from paceline.controller.verify.result import CheckResult
from paceline.controller.verify.subject import Drafter, Run, Subject

NUM_SAMPLES = 2

Texts = Mapping[tuple[int, ...], list[int]]
"""The right completion of each prompt."""


def greedy_tokens(subject: Subject) -> Iterator[CheckResult]:
    """Check that greedy texts are the undrafted engine's and the model's to the context's end."""
    plain, texts = undrafted_texts(subject)
    yield _judged(subject, plain, texts, ())
    _run_greedy(subject, subject.ours)  # what ours drafts from
    ours = _run_greedy(subject, subject.ours)
    yield _judged(subject, ours, texts, ours.faults(accepts=True))
    knowing = subject.scripted("always right", Told(texts, subject.reference.vocabulary))
    num_cut = ScriptedDrafter.counters.num_cut
    right = _run_greedy(subject, knowing)
    faults = right.faults(accepts=True)
    if ScriptedDrafter.counters.num_cut == num_cut:
        faults.append("no draft was longer than the engine takes")
    yield _judged(subject, right, texts, faults)
    told_wrong = Told(texts, subject.reference.vocabulary, shift=1)
    wrong = _run_greedy(subject, subject.scripted("always wrong", told_wrong))
    yield _judged(subject, wrong, texts, wrong.faults(accepts=False))
    argmax = subject.scripted("argmax", ModelDrafter(subject.reference, likeliest))
    run = _run_greedy(subject, argmax)
    yield _judged(subject, run, texts, run.faults(accepts=True))


def stops(subject: Subject) -> Iterator[CheckResult]:
    """Check that texts end at stop token and budget, wherever in a draft these are."""
    _, texts = undrafted_texts(subject)
    knowing = subject.scripted("told beyond", Told(texts, subject.reference.vocabulary))
    _run_greedy(subject, subject.ours)
    for drafter in (subject.ours, knowing):
        asked = list(_ended_early(subject, texts))
        run = subject.run(drafter, [request for request, _ in asked])
        expected = {request.request_id: tokens for request, tokens in asked}
        wrong = [
            sample
            for sample in run.samples
            if sample.completion.token_ids.tolist() != expected[sample.request.request_id]
            or sample.completion.finish_reason != _reason(sample.request)
        ]
        faults = run.faults(accepts=True)
        if wrong:
            faults.append(f"{len(wrong)} of {len(run.samples)} samples end elsewhere")
        yield CheckResult(
            "stops and budgets",
            drafter.name,
            f"{len(run.samples)} greedy texts with the undrafted ones up to their end",
            run.num_tokens,
            run.num_drafted,
            run.num_accepted,
            faults=faults,
        )


def undrafted_texts(subject: Subject) -> tuple[Run, Texts]:
    """Return the greedy completion of every prompt by the engine without drafts."""
    run = _run_greedy(subject, subject.undrafted)
    return run, {
        sample.request.prompt_token_ids: sample.completion.token_ids.tolist()
        for sample in run.samples
    }


def _run_greedy(subject: Subject, drafter: Drafter) -> Run:
    sampling = SamplingParameters(0.0, max_tokens=subject.size.num_greedy_tokens)
    return subject.run(
        drafter, [subject.request(prompt, sampling, NUM_SAMPLES) for prompt in subject.prompts]
    )


def _judged(subject: Subject, run: Run, texts: Texts, faults: Sequence[str]) -> CheckResult:
    evidence = examine(subject.reference, run.samples, subject.generator)
    gaps = [_gap(s, e, texts) for s, e in zip(run.samples, evidence, strict=True)]
    wrong = sum(gap > TIED_LOGITS for gap in gaps)
    below = sum(int((each.gaps > TIED_LOGITS).sum()) for each in evidence)
    faults = [*faults, *logprob_faults(evidence)]
    if wrong:
        faults.append(f"{wrong} of {len(gaps)} samples are not the undrafted engine's")
    if below:
        faults.append(f"{below} tokens are not the model's likeliest")
    return CheckResult(
        "greedy tokens",
        run.drafter.name,
        f"{len(run.samples)} texts with the undrafted engine's and the model's argmax",
        run.num_tokens,
        run.num_drafted,
        run.num_accepted,
        logprob_error=largest_error(evidence),
        faults=faults,
    )


def _gap(sample: Sample, evidence: Evidence, texts: Texts) -> float:
    """Return how far below the likeliest logit a sample's first wrong token is.

    0 where there is none; infinite where only the lengths differ, which no tie excuses.
    """
    found, right = sample.completion.token_ids.tolist(), texts[sample.request.prompt_token_ids]
    for place, (token, expected) in enumerate(zip(found, right, strict=False)):
        if token != expected:
            return float(evidence.gaps[place])
    return 0.0 if len(found) == len(right) else float("inf")


def _ended_early(subject: Subject, texts: Texts) -> Iterator[tuple[RolloutRequest, list[int]]]:
    """Yield requests that end at each place of two rounds of drafts, and what must come out.

    Half of them end at a stop token, half for their budget.
    """
    for prompt, text in texts.items():
        for place in range(2 * NUM_DRAFTED + 2):
            stop = text[place + NUM_DRAFTED]
            to_stop = SamplingParameters(0.0, max_tokens=len(text), stop_token_ids=(stop,))
            yield subject.request(prompt, to_stop, 1), text[: text.index(stop) + 1]
            to_budget = SamplingParameters(0.0, max_tokens=place + 1)
            yield subject.request(prompt, to_budget, 1), text[: place + 1]


def _reason(request: RolloutRequest) -> str:
    return "stop" if request.sampling.stop_token_ids else "length"
