"""Sampled tokens beside what the model says of them, under the version that each claims."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.configs.vocabulary import Completion, RolloutRequest, SamplingParameters
from paceline.controller.verify.checks.distribution import SLACK, constrained, evened
from paceline.controller.verify.reference import Reference


@dataclass(frozen=True)
class Sample:
    """One completion and the request that it answers.

    ``drafts`` int64 [C] are the tokens drafted for each place, -1 where none is known.
    """

    request: RolloutRequest
    completion: Completion
    drafts: NDArray[np.int64]


@dataclass(frozen=True)
class Evidence:
    """Evidence on the N tokens of one sample, in order; every field is [N].

    ``numbers`` float64 are even on [0, 1) if the sampler is right; ``errors`` float64 are distances
    between reported and true log-probabilities, 0 where a token at the edge of top-k or top-p makes
    them ambiguous; ``gaps`` float64 say how far a token's logit is below the highest;
    ``impossible`` bool are tokens that their sampling settings forbid. ``draft_probabilities``
    float64 are those of the tokens drafted, NaN where none is known, and ``hits`` bool say where
    they came out.
    """

    numbers: Tensor
    errors: Tensor
    gaps: Tensor
    impossible: Tensor
    draft_probabilities: Tensor
    hits: Tensor

    @classmethod
    def empty(cls, size: int) -> Evidence:
        """Allocate evidence on ``size`` tokens, still NaN; to be written in place."""
        numbers, errors, gaps, probabilities = torch.full((4, size), torch.nan).double()
        impossible, hits = torch.zeros(2, size, dtype=torch.bool)
        return cls(numbers, errors, gaps, impossible, probabilities, hits)


@dataclass(frozen=True)
class Piece:
    """Tokens ``[start, end)`` of the sample number ``index``."""

    index: int
    start: int
    end: int


def examine(
    reference: Reference,
    samples: Sequence[Sample],
    generator: torch.Generator,
    rival: int | None = None,
) -> list[Evidence]:
    """Look at every token of every sample, each under the version in its span.

    ``rival`` is a version that might have sampled tokens which say they are another's: see
    ``evened``.
    """
    found = [Evidence.empty(len(sample.completion.token_ids)) for sample in samples]
    versions = {span.version for sample in samples for span in sample.completion.versions}
    for version in sorted(versions):
        for sampling, pieces in _pieces_by_sampling(samples, version).items():
            rivals: Iterator[Tensor | None] = itertools.repeat(None, len(pieces))
            if rival not in (None, version):
                reference.load(rival)
                rivals = (
                    constrained(logits, sampling)
                    for logits, _, _ in list(_places(reference, samples, pieces))
                )
            reference.load(version)
            _examine_alike(reference, samples, sampling, pieces, rivals, generator, found)
    assert not any(evidence.numbers.isnan().any() for evidence in found), "a token of no version"
    return found


def _pieces_by_sampling(
    samples: Sequence[Sample], version: int
) -> dict[SamplingParameters, list[Piece]]:
    pieces: dict[SamplingParameters, list[Piece]] = {}
    for index, sample in enumerate(samples):
        for span in sample.completion.versions:
            if span.version == version:
                piece = Piece(index, span.start, span.end)
                pieces.setdefault(sample.request.sampling, []).append(piece)
    return pieces


def _examine_alike(
    reference: Reference,
    samples: Sequence[Sample],
    sampling: SamplingParameters,
    pieces: Sequence[Piece],
    rivals: Iterator[Tensor | None],
    generator: torch.Generator,
    found: Sequence[Evidence],
) -> None:
    """Examine pieces of one version and one way of sampling; write into ``found``."""
    for piece, rival, (logits, tokens, reported) in zip(
        pieces, rivals, _places(reference, samples, pieces), strict=True
    ):
        probabilities = constrained(logits, sampling)
        loose, tight = (constrained(logits, sampling, slack) for slack in (SLACK, -SLACK))
        own = probabilities.gather(-1, tokens[:, None])[:, 0]
        draws = torch.rand(len(tokens), generator=generator, dtype=torch.float64)
        ambiguous = ((loose > 0) != (tight > 0)).any(-1)
        chosen = logits.gather(-1, tokens[:, None])[:, 0]
        places = slice(piece.start, piece.end)
        evidence = found[piece.index]
        evidence.numbers[places] = evened(probabilities, tokens, draws, rival)
        evidence.impossible[places] = loose.gather(-1, tokens[:, None])[:, 0] == 0
        evidence.errors[places] = (own.log() - reported).abs().masked_fill(ambiguous, 0.0)
        evidence.gaps[places] = (logits.max(-1).values - chosen).double()
        drafts = torch.from_numpy(samples[piece.index].drafts[places])
        of_draft = probabilities.gather(-1, drafts.clamp_min(0)[:, None])[:, 0]
        evidence.draft_probabilities[places] = of_draft.masked_fill(drafts < 0, torch.nan)
        evidence.hits[places] = drafts == tokens


def _places(
    reference: Reference, samples: Sequence[Sample], pieces: Sequence[Piece]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield logits [n, V], tokens int64 [n] and reported log-probabilities float64 [n] by piece."""
    chosen = [samples[piece.index] for piece in pieces]
    texts = [
        (sample.request.prompt_token_ids, sample.completion.token_ids.tolist()) for sample in chosen
    ]
    for sample, piece, logits in zip(
        chosen, pieces, reference.completion_logits(texts), strict=True
    ):
        places = slice(piece.start, piece.end)
        yield (
            logits[places],
            torch.from_numpy(sample.completion.token_ids[places]).long(),
            torch.from_numpy(sample.completion.logprobs[places]).double(),
        )
