"""History of sampled text, and drafts from it: suffix automata by problem and weight version.

Rollouts of one problem repeat each other: those of its group that are being sampled now, those of
earlier epochs, and texts from files. A ``History`` keeps one suffix automaton for each
problem and generation (the weight version that sampled the text); a ``Reader`` follows the requests
of one engine through them and drafts for a whole batch in one native call. DAS (arXiv 2511.13841)
does it with suffix trees; see ``spec/native/`` for the structure and how readers go without locks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.spec import _native

Tokens = NDArray[np.int32] | Sequence[int]


@dataclass(frozen=True)
class GenerationSummary:
    """Size of one problem's text from one weight version."""

    problem: str
    generation: int
    num_tokens: int
    num_states: int
    memory_bytes: int


@dataclass(frozen=True)
class Drafts:
    """Drafts of B requests, at most K tokens each; a row is filled up with -1 and 0.

    ``tokens`` int32 [B, K]; ``probabilities`` float32 [B, K], the estimated probability of each
    token given those before it; ``num_tokens`` int32 [B]; ``matches`` int32 [B], how many of the
    last tokens matched; ``generations`` int64 [B], the newest that voted for the first token (-1
    where nothing is drafted).
    """

    tokens: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    num_tokens: NDArray[np.int32]
    matches: NDArray[np.int32]
    generations: NDArray[np.int64]

    def of(self, row: int) -> list[int]:
        """Return the draft of one request, without filling."""
        return self.tokens[row, : self.num_tokens[row]].tolist()


class History:
    """Store of sampled text, within a window of generations and a cap on memory.

    A problem keeps its newest ``window`` generations. All memory for all problems stays within
    ``max_bytes`` at any moment: to stay within it, the oldest generation of all is dropped, even
    the one that is being added to. Generations are dropped whole. A dropped one does not come back
    while the problem still has others. A generation's number is any int64; newer ones are larger.

    Token ids are int32; contiguous numpy int32 arrays are read in place, an array of another dtype
    raises ``TypeError``, a sequence of ints is copied. In a text that repeats itself for long, only
    the longest of its suffixes are counted, so that adding stays linear. Calls release the GIL.

    Any thread may call. Writers wait for each other; readers never wait for a writer.
    """

    def __init__(self, window: int = 16, max_bytes: int = 1 << 30) -> None:
        if window < 1 or max_bytes < 1:
            raise ValueError(f"window and max_bytes must be positive, got {window} and {max_bytes}")
        self.window = window
        self.max_bytes = max_bytes
        self._native = _native.History(window, max_bytes)

    def add(self, problem: str, generation: int, sequence: Tokens) -> None:
        """Add one whole sequence; no match ever crosses into another."""
        self._native.add(problem, generation, as_tokens(sequence))

    def extend(self, problem: str, generation: int, sequence: str, tokens: Tokens) -> None:
        """Add the next tokens of an open sequence, named by the caller: one being sampled."""
        self._native.extend(problem, generation, sequence, as_tokens(tokens))

    def end_sequence(self, problem: str, generation: int, sequence: str) -> None:
        """Close an open sequence; its name may be used again."""
        self._native.end_sequence(problem, generation, sequence)

    def forget(self, before: int) -> None:
        """Drop all generations before this one for good, as too far off-policy."""
        self._native.forget(before)

    def reader(self, min_match: int = 1, max_match: int = 32, decay: float = 0.8) -> Reader:
        """Return a reader, for one engine; see ``Reader`` for what the numbers mean."""
        return Reader(self, min_match, max_match, decay)

    def summaries(self) -> list[GenerationSummary]:
        """Return the size of every generation of every problem, the oldest first."""
        return [GenerationSummary(*each) for each in self._native.summaries()]

    def sequences(self, problem: str, generation: int) -> list[NDArray[np.int32]]:
        """Return the sequences of a generation, open ones last; none if it is not stored."""
        return self._native.sequences(problem, generation)

    @property
    def num_problems(self) -> int:
        """Number of problems with text, or with an open request."""
        return self._native.num_problems

    @property
    def num_tokens(self) -> int:
        """Number of tokens stored now."""
        return self._native.num_tokens

    @property
    def num_refused_tokens(self) -> int:
        """Number of tokens refused so far, as outside the window or for lack of memory."""
        return self._native.num_refused_tokens

    @property
    def num_dropped_generations(self) -> int:
        """Number of generations dropped so far, whatever the reason."""
        return self._native.num_dropped_generations

    @property
    def memory_bytes(self) -> int:
        """Heap bytes of the stored text, without what readers keep of their requests."""
        return self._native.memory_bytes


class Reader:
    """Drafter for one engine's requests, followed token by token; one thread at a time.

    Each generation of the request's problem is matched with the last ``max_match`` tokens of the
    request: its longest suffix that something followed there. The generations with the longest
    match, of ``min_match`` tokens at least, vote for what most often followed (the smallest token
    on a tie), each with the number of times it did times ``decay`` to the power of the
    generation's age, counted in generations of that problem. The token with most votes is drafted
    (the newer generation's on a tie), and the generations that voted for it vote for the next.

    A request costs two or three look-ups a token and generation, never a pass over its text:
    ``propose`` takes only the tokens that are new. A draft is that of the history at some moment
    during the call; nothing in the call waits for a writer.
    """

    def __init__(self, history: History, min_match: int, max_match: int, decay: float) -> None:
        if not 1 <= min_match <= max_match:
            raise ValueError(f"expected 1 <= min_match <= max_match, got {min_match}, {max_match}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {decay}")
        self._native = _native.Reader(history._native, min_match, max_match, decay)

    def open(self, problem: str, seed: int | None = None, position: int = 0) -> int:
        """Open a request with no text yet, and return its id; the problem may get text later.

        A ``seed`` is for coupled sampling alone, see ``paceline.spec.noise``: every continuation
        counts, and what is drafted is argmax(log(votes) + noise of the seed, position and token).
        ``probabilities`` remain shares of the votes. ``position`` is that of the first token which
        ``propose`` will bring, counted from the first one of the prompt. Under the ratio rule a
        seed would bias what is sampled: no draft may depend on the verifier's randomness there.
        """
        return self._native.open(problem, seed, position)

    def close(self, request: int) -> None:
        """Close a request; raises ``ValueError`` if it is not open."""
        self._native.close(request)

    def propose(
        self,
        requests: Sequence[int] | NDArray[np.int64],
        new_tokens: Sequence[Tokens],
        max_draft: int | Sequence[int] | NDArray[np.int32],
        min_probability: float = 0.0,
    ) -> Drafts:
        """Take each request's new tokens since the last call, and draft what follows them.

        The first call of a request brings its prompt. ``max_draft`` is one number for all or one
        for each; zero drafts nothing. A draft ends before the estimated probability that all of it
        is right falls below ``min_probability``. Raises ``ValueError``, with nothing taken, for a
        request that is not open or named twice, or arguments of unequal length.
        """
        arrays = [as_tokens(tokens) for tokens in new_tokens]
        if len(arrays) != len(requests):
            raise ValueError(f"got {len(requests)} requests and tokens of {len(arrays)}")
        return self.propose_flat(
            np.asarray(requests, np.int64),
            np.concatenate(arrays) if arrays else np.zeros(0, np.int32),
            np.array([array.size for array in arrays], np.int32),
            np.ascontiguousarray(np.broadcast_to(np.asarray(max_draft, np.int32), len(arrays))),
            min_probability,
        )

    def propose_flat(
        self,
        requests: NDArray[np.int64],
        new_tokens: NDArray[np.int32],
        num_new_tokens: NDArray[np.int32],
        max_draft: NDArray[np.int32],
        min_probability: float = 0.0,
    ) -> Drafts:
        """Draft as ``propose`` from contiguous arrays [B], all new tokens in one array."""
        return Drafts(
            *self._native.propose(requests, new_tokens, num_new_tokens, max_draft, min_probability)
        )

    @property
    def num_requests(self) -> int:
        """Number of open requests."""
        return self._native.num_requests


def as_tokens(tokens: Tokens) -> NDArray[np.int32]:
    """Return the tokens as native code reads them: an array as it is, a sequence of ints copied."""
    return tokens if isinstance(tokens, np.ndarray) else np.array(tokens, dtype=np.int32)
