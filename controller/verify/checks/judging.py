"""From evidence to verdicts: what every check of sampled tokens asks (pure)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.configs.vocabulary import SamplingParameters
from paceline.controller.verify.checks.distribution import (
    ChiSquare,
    as_often_as,
    even_each,
    even_in_pairs,
)
from paceline.controller.verify.checks.evidence import Evidence

LOGPROB_TOLERANCE = 1e-3
"""Largest distance of a reported log-probability from the model's, both in float32. What is usual
is a hundredth of it on a CPU; the model's matrices are multiplied in another order elsewhere."""

TIED_LOGITS = 1e-3
"""Two tokens whose logits are nearer than this are equally right at temperature 0."""


def describe(sampling: SamplingParameters) -> str:
    """Write sampling settings in a few characters, for example ``T=0.8 k=5``."""
    parts = [f"T={sampling.temperature:g}"]
    if sampling.top_k:
        parts.append(f"k={sampling.top_k}")
    if sampling.top_p < 1.0:
        parts.append(f"p={sampling.top_p:g}")
    return " ".join(parts)


def joined(evidence: Sequence[Evidence], what: str) -> Tensor:
    """Join one field of all evidence, end to end."""
    return torch.cat([getattr(each, what) for each in evidence])


def sampled_evenly(what: str, evidence: Sequence[Evidence]) -> list[ChiSquare]:
    """Test tokens against the model; and neighbours, where samples are equally long."""
    comparisons = [even_each(what, joined(evidence, "numbers"))]
    if len({len(each.numbers) for each in evidence}) == 1:
        numbers = torch.stack([each.numbers for each in evidence])
        comparisons.append(even_in_pairs(f"{what}, pairs", numbers))
    return comparisons


def drafts_accepted(evidence: Sequence[Evidence]) -> list[ChiSquare]:
    """Test whether drafted tokens come out as often as the model says; empty where unknown."""
    probabilities = joined(evidence, "draft_probabilities")
    known = ~probabilities.isnan()
    found = as_often_as("drafts", joined(evidence, "hits")[known], probabilities[known])
    return [found] if found else []


def distribution_faults(
    evidence: Sequence[Evidence], comparisons: Sequence[ChiSquare]
) -> list[str]:
    """Return what is wrong with how tokens are distributed."""
    faults = [
        f"{found.what}: chi-square {found.statistic:.1f} at {found.degrees} degrees of freedom, "
        f"probability {found.probability:.1e}"
        for found in comparisons
        if found.is_suspicious
    ]
    impossible = int(joined(evidence, "impossible").sum())
    if impossible:
        faults.append(f"{impossible} tokens that their sampling settings forbid")
    return faults


def logprob_faults(evidence: Sequence[Evidence]) -> list[str]:
    """Report log-probabilities that are not the model's, but for those of impossible tokens."""
    errors = joined(evidence, "errors")[~joined(evidence, "impossible")]
    wrong = int((~(errors <= LOGPROB_TOLERANCE)).sum())
    if not wrong:
        return []
    return [
        f"{wrong} of {len(errors)} log-probabilities are further than {LOGPROB_TOLERANCE:g} from "
        f"the model's, the worst by {float(errors.max()):.2g}"
    ]


def largest_error(evidence: Sequence[Evidence]) -> float:
    """Return the largest distance of a reported log-probability from the model's."""
    errors = joined(evidence, "errors")
    return float(errors[errors.isfinite()].max())
