"""Coupled sampling: a sample is fixed by its seed and the weights, whatever is drafted.

The strongest of all checks, for it needs no statistics: drafted and undrafted runs are the same
token for token at any temperature. That what they sample is the model's too, is held as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from paceline.controller.verify.checks.sampling import TOGETHER, requests_for, sampled_by
from paceline.controller.verify.drafters import ModelDrafter, mixed
from paceline.controller.verify.result import CheckResult
from paceline.controller.verify.subject import OWN_DRAFTING, SCRIPTED, Drafter, Run, Subject

MOST_PARTED = 2
"""Samples that may part: a draft changes the shape of a batch, and thereby the last bits of its
logits, which decide where two tokens are as good as equal. None of 5,184 did on a CPU."""


def coupled_tokens(subject: Subject) -> Iterator[CheckResult]:
    """Check that samples of the same seeds are the same tokens, drafted and undrafted."""
    plain = Drafter("none", subject.engine(coupled_sampling=True), drafts=False)
    scripted = subject.engine(coupled_sampling=True, speculative_config=SCRIPTED)
    anything = Drafter("anything", scripted, ModelDrafter(subject.reference, mixed))
    requests = list(chain.from_iterable(requests_for(subject, sampling) for sampling in TOGETHER))
    expected = subject.run(plain, requests)
    for drafter in (_ours(subject), anything):
        yield _compared(subject.run(drafter, requests), expected)


def coupled_distribution(subject: Subject) -> Iterator[CheckResult]:
    """Check that coupled samples are distributed as the model says, like any others."""
    yield from sampled_by(subject, _ours(subject))


def _ours(subject: Subject) -> Drafter:
    engine = subject.engine(coupled_sampling=True, drafting=OWN_DRAFTING)
    return Drafter("ours, coupled", engine)


def _compared(run: Run, expected: Run) -> CheckResult:
    """Compare token by token, sample by sample."""
    parted = sum(
        found.completion.token_ids.tolist() != right.completion.token_ids.tolist()
        for found, right in zip(run.samples, expected.samples, strict=True)
    )
    faults = run.faults(accepts=True)
    if parted > MOST_PARTED:
        faults.append(f"{parted} of {len(run.samples)} samples are not the undrafted ones")
    return CheckResult(
        "coupled tokens",
        run.drafter.name,
        f"{len(run.samples)} samples with the undrafted ones of their seeds; {parted} parted",
        run.num_tokens,
        run.num_drafted,
        run.num_accepted,
        faults=faults,
    )
