"""Drafting from what was sampled before: a suffix automaton over earlier rollouts.

Rollouts of one problem repeat each other. The longest suffix of the text so far that occurred in
an earlier rollout, and what most often followed it there, is a good and nearly free draft (DAS,
arXiv 2511.13841, uses a suffix tree for it). The structure is native code, see ``spec/native/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from paceline.spec import _native

Tokens = NDArray[np.int32] | Sequence[int]


class SuffixDrafter:
    """Proposes the most frequent continuation of the longest suffix seen before.

    Deterministic: the same sequences in the same order give the same drafts, and of two equally
    frequent continuations the smaller token id is proposed. In a text that repeats itself for
    long, only the longest of its suffixes are counted, so that learning stays linear.

    Token ids are int32; contiguous numpy int32 arrays are read in place, an array of another dtype
    raises ``TypeError``, a sequence of ints is copied. Calls release the GIL; queries run beside
    each other and beside adding, and wait for nobody.
    """

    def __init__(self, sequences: Iterable[Tokens] = ()) -> None:
        self._automaton = _native.SuffixAutomaton()
        for sequence in sequences:
            self.add(sequence)

    def add(self, sequence: Tokens) -> None:
        """Learn one whole sequence; no match ever crosses into another."""
        self.extend(sequence)
        self.end_sequence()

    def extend(self, tokens: Tokens) -> None:
        """Learn the next tokens of the open sequence: a rollout that is still being sampled."""
        self._automaton.extend(as_tokens(tokens))

    def end_sequence(self) -> None:
        """Close the open sequence."""
        self._automaton.end_sequence()

    def longest_match(self, context: Tokens) -> int:
        """Length of the longest suffix of ``context`` that occurs in some sequence.

        Reads the whole context: pass its tail where that is enough.
        """
        return self._automaton.longest_match(as_tokens(context))

    def propose(self, context: Tokens, max_tokens: int) -> list[int]:
        """Draft at most ``max_tokens`` tokens after ``context``; empty if nothing is known.

        The draft continues the longest suffix of ``context`` that occurs somewhere with a token
        after it, one most frequent token at a time, and ends where every sequence ended.
        """
        return self._automaton.propose(as_tokens(context), max_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens learned."""
        return self._automaton.num_tokens

    @property
    def num_states(self) -> int:
        """States of the automaton; fewer than two a token."""
        return self._automaton.num_states

    @property
    def memory_bytes(self) -> int:
        """Heap bytes held."""
        return self._automaton.memory_bytes


def as_tokens(tokens: Tokens) -> NDArray[np.int32]:
    """The tokens as native code reads them: an array as it is, a sequence of ints copied."""
    return tokens if isinstance(tokens, np.ndarray) else np.array(tokens, dtype=np.int32)
