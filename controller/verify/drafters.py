"""Drafters that are right or wrong on purpose, for vLLM's ``custom_class``.

vLLM builds the class by its name, so what is drafted next is said to the class: ``drafting``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from paceline.controller.verify.reference import Reference

NUM_DRAFTED = 3
"""Tokens an engine verifies at a time, at most."""

Script = Callable[[Sequence[NDArray[np.int32]]], Sequence[Sequence[int]]]
"""From all tokens of each row so far to a draft for each: a function of the past and nothing else,
so that it is independent of what the sampler draws next."""


def nothing(contexts: Sequence[NDArray[np.int32]]) -> Sequence[Sequence[int]]:
    """Draft nothing, as a script."""
    return [()] * len(contexts)


@dataclass
class Counters:
    """Tokens drafted, those of them that were accepted, and drafts that were too long."""

    num_drafted: int = 0
    num_accepted: int = 0
    num_cut: int = 0


class RowDrafter:
    """Base of what vLLM builds for ``custom_class``: ``write`` drafts from all tokens of a row."""

    def __init__(self, vllm_config: Any) -> None:
        self._max_tokens = int(vllm_config.speculative_config.num_speculative_tokens)

    def load_model(self, target_model: Any) -> None:
        """Load no model: there is none."""

    def write(
        self, rows: Sequence[int], contexts: Sequence[NDArray[np.int32]]
    ) -> Sequence[Sequence[int]]:
        """Return a draft, however long, for each of these rows of the batch."""
        raise NotImplementedError

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft for every row that was just given tokens; see ``SuffixProposer.propose``."""
        rows = [row for row, sampled in enumerate(sampled_token_ids) if sampled]
        contexts = [token_ids_cpu[row, : num_tokens_no_spec[row]] for row in rows]
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        for row, draft in zip(rows, self.write(rows, contexts) if rows else (), strict=True):
            # vLLM does not cut what is longer than it asked for, and ends
            drafts[row] = list(draft[: self._max_tokens])
        return drafts


class ScriptedDrafter(RowDrafter):
    """Drafter that follows a script."""

    script: ClassVar[Script] = staticmethod(nothing)
    counters: ClassVar[Counters] = Counters()
    drafts: ClassVar[dict[bytes, list[int]]] = {}
    """Every draft of the script, by all tokens before it (int32)."""

    def write(
        self, rows: Sequence[int], contexts: Sequence[NDArray[np.int32]]
    ) -> Sequence[Sequence[int]]:
        """Return what the script drafts, and note it."""
        written = type(self).script(contexts)
        for context, draft in zip(contexts, written, strict=True):
            self.drafts[context.tobytes()] = list(draft[: self._max_tokens])
            self.counters.num_cut += len(draft) > self._max_tokens
        return written

    def propose(
        self, sampled_token_ids: Sequence[Sequence[int]], *arguments: Any, **named: Any
    ) -> list[list[int]]:
        """Count what is drafted, and what was accepted of the drafts before."""
        drafts = super().propose(sampled_token_ids, *arguments, **named)
        # a row without a draft is given one token a step, one with a draft those it accepted more
        self.counters.num_accepted += sum(len(new) - 1 for new in sampled_token_ids if new)
        self.counters.num_drafted += sum(map(len, drafts))
        return drafts


@contextmanager
def drafting(script: Script) -> Iterator[None]:
    """Let every ``ScriptedDrafter`` follow a script while the block runs."""
    before = ScriptedDrafter.script
    ScriptedDrafter.script = staticmethod(script)
    ScriptedDrafter.drafts.clear()
    try:
        yield
    finally:
        ScriptedDrafter.script = before


def drafted(prompt: Sequence[int], completion: Sequence[int]) -> NDArray[np.int64]:
    """Return what the last script drafted for each place of a completion [C]; -1 for nothing.

    A draft is for the places it reaches while the tokens before them are the drafted ones.
    """
    whole = np.array([*prompt, *completion], dtype=np.int32)
    found = np.full(len(completion), -1, dtype=np.int64)
    draft: list[int] = []
    for place, token in enumerate(completion):
        context = whole[: len(prompt) + place].tobytes()
        draft = ScriptedDrafter.drafts.get(context, draft)
        if draft:
            found[place] = draft[0]
            draft = draft[1:] if draft[0] == token else []
    return found


class ModelDrafter:
    """Script by the model itself: ``ranks`` says which of its tokens, 0 being the likeliest.

    ``ranks`` takes a context int32 [L] and answers one rank for each token of the draft; -1 is the
    least likely token. Each is taken where the tokens before it have led.
    """

    def __init__(
        self, reference: Reference, ranks: Callable[[NDArray[np.int32]], Sequence[int]]
    ) -> None:
        self._reference = reference
        self._ranks = ranks

    def __call__(self, contexts: Sequence[NDArray[np.int32]]) -> list[list[int]]:
        """Draft for every context, as a script."""
        wanted = [self._ranks(context) for context in contexts]
        grown = [context.tolist() for context in contexts]
        for place in range(max(map(len, wanted))):
            open_rows = [row for row, ranks in enumerate(wanted) if place < len(ranks)]
            order = self._reference.next_logits([grown[row] for row in open_rows]).argsort(
                dim=-1, descending=True
            )
            for row, tokens in zip(open_rows, order, strict=True):
                grown[row].append(int(tokens[wanted[row][place]]))
        return [whole[len(context) :] for whole, context in zip(grown, contexts, strict=True)]


def likeliest(context: NDArray[np.int32]) -> Sequence[int]:
    """Rank as the drafter that is right as often as can be without knowing the future."""
    return [0] * NUM_DRAFTED


def least_likely(context: NDArray[np.int32]) -> Sequence[int]:
    """Rank as the drafter that is wrong as often as can be; top-k and top-p forbid these."""
    return [-1] * NUM_DRAFTED


def mixed(context: NDArray[np.int32]) -> Sequence[int]:
    """Choose number and ranks by a hash of the context: rows with drafts of all kinds."""
    dice = random.Random(xxhash.xxh3_64_intdigest(context.tobytes()))
    return [dice.choice((0, 0, 0, 1, 1, 2, 3, -1)) for _ in range(dice.randint(0, NUM_DRAFTED))]


class Told:
    """Script that knows how each prompt goes on, and drafts all the rest, however long.

    ``shift`` is added to every token it drafts: it is then always wrong.
    """

    def __init__(
        self, texts: Mapping[tuple[int, ...], Sequence[int]], vocabulary: int, shift: int = 0
    ) -> None:
        self._texts = {prompt: np.asarray(text) for prompt, text in texts.items()}
        self._vocabulary = vocabulary
        self._shift = shift

    def __call__(self, contexts: Sequence[NDArray[np.int32]]) -> list[list[int]]:
        """Draft the rest of every context, as a script."""
        return [self._rest(tuple(context.tolist())) for context in contexts]

    def _rest(self, context: tuple[int, ...]) -> list[int]:
        for prompt, text in self._texts.items():
            if context[: len(prompt)] == prompt:
                rest = text[len(context) - len(prompt) :]
                return ((rest + self._shift) % self._vocabulary).tolist()
        return []
