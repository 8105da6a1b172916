"""Samples of one prompt are trained together, so that the prompt is computed once (pure, numpy).

The completions of a group all continue the same tokens. A bundle lays the prompt into the row once
and every completion's own tokens after it; attention lets each completion see the prompt. Values
and gradients are those of separate sequences, for a fraction of the work when prompts are long or
completions many.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from paceline.learner.batch.sequences import TokenSequence

KEYS_PER_TOKEN = 4
"""A shared prompt's keys are read by every completion: a bundle may hold this many keys a token of
room, so that memory stays bounded where short completions share a long prompt."""

BUNDLES_PER_RANK = 4
"""No bundle exceeds this fraction of a rank's work: larger ones could not be balanced."""


@dataclass(frozen=True)
class Bundle:
    """Samples that share their first ``prefix`` tokens; one alone shares nothing, prefix 0.

    ``samples`` are indices into the batch, ``own_lengths`` the tokens each adds to the prefix.
    """

    prefix: int
    samples: tuple[int, ...]
    own_lengths: tuple[int, ...]

    @property
    def first_length(self) -> int:
        """Tokens that come first and continue nothing: the prefix, or the one sample."""
        return self.prefix or self.own_lengths[0]

    @property
    def num_tokens(self) -> int:
        """Tokens it takes in the row."""
        return self.prefix + sum(self.own_lengths)

    @property
    def num_keys(self) -> int:
        """Keys that attention reads: every sample's whole length, and the prompt's own."""
        return self.num_tokens + len(self.samples) * self.prefix

    @property
    def size(self) -> int:
        """Share of ``learner.tokens_per_microbatch`` that it takes, in tokens."""
        return max(self.num_tokens, math.ceil(self.num_keys / KEYS_PER_TOKEN))

    def cost(self, quadratic_cost: float) -> float:
        """Work of linear layers (1 a token) and of attention (``quadratic_cost`` a pair)."""
        own = np.asarray(self.own_lengths, dtype=np.float64)
        pairs = self.prefix**2 + float((own * (own + 2 * self.prefix)).sum())
        return self.num_tokens + quadratic_cost * pairs


def bundle_samples(
    sequences: Sequence[TokenSequence],
    capacity: int,
    num_ranks: int = 1,
    *,
    shares_prompts: bool = True,
) -> list[Bundle]:
    """Put samples of one prompt together; each that has a completion is in one bundle.

    Where no prompts are shared each sample is a bundle of its own.

    A bundle's ``size`` stays within ``capacity``, unless one sample alone exceeds it, and within a
    fraction of a rank's work. The result depends on the arguments only, so all ranks agree.
    """
    siblings: dict[Hashable, list[int]] = defaultdict(list)
    for index, sequence in enumerate(sequences):
        if sequence.num_read:
            assert sequence.num_prompt, "nothing precedes the completion that could predict it"
            siblings[_family(sequence) if shares_prompts else index].append(index)
    limit = capacity
    if num_ranks > 1:
        all_tokens = sum(sequence.num_read for sequence in sequences)
        limit = min(capacity, all_tokens // (BUNDLES_PER_RANK * num_ranks))
    return [bundle for family in siblings.values() for bundle in _split(family, sequences, limit)]


def _family(sequence: TokenSequence) -> Hashable:
    """Return what samples that share their prompt have in common: its tokens and, where routers
    choose as the engine's did, its experts."""
    experts = sequence.routed_experts
    routing = None if experts is None else experts[: sequence.num_prompt].tobytes()
    return sequence.prompt, routing


def _split(indices: Sequence[int], sequences: Sequence[TokenSequence], limit: int) -> list[Bundle]:
    bundles = []
    bundle: Bundle | None = None
    for index in indices:
        grown = _with(bundle, index, sequences)
        if bundle is not None and grown.size > limit:
            bundles.append(bundle)
            grown = _with(None, index, sequences)
        bundle = grown
    return [*bundles, bundle] if bundle is not None else bundles


def _with(bundle: Bundle | None, index: int, sequences: Sequence[TokenSequence]) -> Bundle:
    """Add a sample to the bundle; the second one turns the first's beginning into a prefix."""
    if bundle is None:
        return Bundle(0, (index,), (sequences[index].num_read,))
    samples = (*bundle.samples, index)
    prefix = sequences[index].num_prompt
    return Bundle(prefix, samples, tuple(sequences[i].num_read - prefix for i in samples))
