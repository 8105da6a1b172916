"""How sampled tokens are held against a model's probabilities (pure).

A token x at a place where the model says p is given the number u = P(likelier tokens) + v p(x), v
drawn evenly from [0, 1) by us. If, and only if, every token is drawn from p, given all tokens
before it, these numbers are independent and even on [0, 1) (Rosenblatt's transformation, 1952): at
any prompt, temperature or length, and whatever was drafted, as long as drafts know only the past.
So one chi-square over equal cells of [0, 1) judges all places together. Likelier tokens come first
so that a wrong temperature, or a drafted token that is accepted too often, tilts the numbers.

Where the draft x is known, a sharper question: does x come out as often as p(x) says? It is asked
of all such places at once, in the normal approximation to a sum of independent events.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.configs.vocabulary import SamplingParameters

SLACK = 1e-5
"""Two implementations may disagree about a token this close to the edge of top-k (in logits) or
top-p (in probability): neither is wrong."""

SUSPICIOUS = 1e-6
"""Probability of one comparison under which a sampler is called wrong: among a thousand of them,
a right one is once in a thousand runs."""

LEAST_VARIANCE = 100.0
"""Of a number of events that is taken to be normally distributed."""

NUM_CELLS = 16
NUM_PAIR_CELLS = 4
"""Cells of [0, 1) for one number, and for each of two neighbouring ones."""


@dataclass(frozen=True)
class ChiSquare:
    """A statistic with its degrees of freedom; ``probability`` of one at least as large."""

    what: str
    statistic: float
    degrees: int
    probability: float

    @property
    def is_suspicious(self) -> bool:
        """True where a right sampler would hardly ever be this far off."""
        return self.probability < SUSPICIOUS


def constrained(logits: Tensor, sampling: SamplingParameters, slack: float = 0.0) -> Tensor:
    """Return the distribution that is sampled from: float64 [N, V] of logits [N, V].

    Temperature, then top-k, then top-p of what is left. ``slack`` keeps tokens that lie so little
    beyond the edge; less than 0, it drops those that lie so little within that of top-p. At
    temperature 0 it is the distribution at 1, of which log-probabilities are reported there.
    """
    logits = logits.double() / (sampling.temperature or 1.0)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth - max(slack, 0.0), -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        before[..., 0] = -1.0  # the likeliest stays, whatever top-p is
        outside = (before >= sampling.top_p + slack).gather(-1, order.argsort(-1))
        probabilities = probabilities.masked_fill(outside, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def evened(
    probabilities: Tensor, tokens: Tensor, draws: Tensor, rival: Tensor | None = None
) -> Tensor:
    """Return even numbers [N] of tokens int64 [N] by probabilities [N, V]; ``draws`` [N] in [0, 1).

    With the probabilities [N, V] of a ``rival``, tokens that it likes better come first, in place
    of likelier ones: the numbers are tilted where tokens are the rival's.
    """
    order = probabilities if rival is None else (rival / probabilities).nan_to_num(0.0)
    own, place = (each.gather(-1, tokens[:, None]) for each in (probabilities, order))
    indices = torch.arange(probabilities.shape[-1], device=tokens.device)
    first = (order > place) | ((order == place) & (indices < tokens[:, None]))
    before = (probabilities * first).sum(-1)
    return (before + draws * own[:, 0]).clamp(0.0, 1.0 - 1e-12)


def chi_square(what: str, cells: Tensor, num_cells: int) -> ChiSquare:
    """Test whether cell numbers int64 [N] fall evenly on ``num_cells``."""
    counts = torch.bincount(cells, minlength=num_cells).double()
    expected = len(cells) / num_cells
    statistic = float(((counts - expected) ** 2 / expected).sum()) if len(cells) else 0.0
    return ChiSquare(what, statistic, num_cells - 1, beyond(statistic, num_cells - 1))


def even_each(what: str, numbers: Tensor) -> ChiSquare:
    """Test whether numbers [N] are even on [0, 1)."""
    return chi_square(what, (numbers * NUM_CELLS).long(), NUM_CELLS)


def as_often_as(what: str, hits: Tensor, probabilities: Tensor) -> ChiSquare | None:
    """Test whether events bool [N] happen as often as their probabilities [N] say.

    None where too few are to be expected for the approximation.
    """
    variance = float((probabilities * (1 - probabilities)).sum())
    if variance < LEAST_VARIANCE:
        return None
    statistic = float((hits.double() - probabilities).sum()) ** 2 / variance
    return ChiSquare(what, statistic, 1, beyond(statistic, 1))


def even_in_pairs(what: str, numbers: Tensor) -> ChiSquare:
    """Test whether neighbours are independent: numbers [samples, L], taken two by two.

    Finds randomness that is used twice. All samples must have the same length: where a sample may
    end at a drafted token, whether a pair is whole would depend on its first number.
    """
    pairs = (numbers[:, : numbers.shape[1] // 2 * 2] * NUM_PAIR_CELLS).long().reshape(-1, 2)
    return chi_square(what, pairs[:, 0] * NUM_PAIR_CELLS + pairs[:, 1], NUM_PAIR_CELLS**2)


def beyond(statistic: float, degrees: int) -> float:
    """Return the probability of a larger chi-square."""
    halves = torch.tensor([degrees / 2.0, statistic / 2.0], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))
