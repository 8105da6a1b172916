"""The suffix drafter against a brute-force model of what it promises."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.spec.suffix import SuffixDrafter

INT32_LIMITS = (-(2**31), 2**31 - 1)
sequences_of_few_tokens = st.lists(st.lists(st.integers(0, 2), max_size=14), max_size=5)
contexts = st.lists(st.integers(0, 3), max_size=8)


def suffixes(context: list[int]) -> Iterator[list[int]]:
    """Non-empty suffixes, longest first."""
    return (context[start:] for start in range(len(context)))


def occurs(text: list[int], sequence: list[int]) -> bool:
    return any(sequence[i : i + len(text)] == text for i in range(len(sequence) - len(text) + 1))


def longest_match_by_search(sequences: list[list[int]], context: list[int]) -> int:
    for suffix in suffixes(context):
        if any(occurs(suffix, sequence) for sequence in sequences):
            return len(suffix)
    return 0


def favourite_continuation(sequences: list[list[int]], text: list[int]) -> int | None:
    following = Counter(
        sequence[i + len(text)]
        for sequence in sequences
        for i in range(len(sequence) - len(text))
        if sequence[i : i + len(text)] == text
    )
    return min(following, key=lambda token: (-following[token], token), default=None)


def propose_by_search(sequences: list[list[int]], context: list[int], max_tokens: int) -> list[int]:
    for suffix in suffixes(context):
        text = list(suffix)
        while len(text) - len(suffix) < max_tokens:
            token = favourite_continuation(sequences, text)
            if token is None:
                break
            text.append(token)
        if len(text) > len(suffix):
            return text[len(suffix) :]
    return []


@given(sequences_of_few_tokens, contexts)
def test_longest_match_agrees_with_search(sequences: list[list[int]], context: list[int]) -> None:
    assert SuffixDrafter(sequences).longest_match(context) == longest_match_by_search(
        sequences, context
    )


@given(sequences_of_few_tokens, contexts, st.integers(0, 6))
def test_draft_follows_the_most_frequent_continuation_of_the_longest_suffix(
    sequences: list[list[int]], context: list[int], max_tokens: int
) -> None:
    draft = SuffixDrafter(sequences).propose(context, max_tokens)
    assert draft == propose_by_search(sequences, context, max_tokens)


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=6), contexts)
def test_a_growing_sequence_is_known_at_every_step_and_however_it_is_cut(
    pieces: list[list[int]], context: list[int]
) -> None:
    drafter = SuffixDrafter([[0, 1, 2, 0, 1]])
    text: list[int] = []
    for piece in pieces:
        drafter.extend(piece)
        text += piece
        sequences = [[0, 1, 2, 0, 1], text]
        assert drafter.longest_match(context) == longest_match_by_search(sequences, context)
        assert drafter.propose(context, 4) == propose_by_search(sequences, context, 4)


@given(sequences_of_few_tokens)
def test_states_stay_below_two_a_token(sequences: list[list[int]]) -> None:
    drafter = SuffixDrafter(sequences)
    assert drafter.num_tokens == sum(map(len, sequences))
    assert drafter.num_states <= max(1, 2 * drafter.num_tokens)


def test_matches_never_cross_sequences() -> None:
    drafter = SuffixDrafter([[1, 2, 3], [4, 5, 6]])
    assert drafter.longest_match([3, 4]) == 1
    assert drafter.propose([2, 3], 4) == []


def test_equally_frequent_continuations_yield_the_smallest_token() -> None:
    assert SuffixDrafter([[1, 9], [1, 5], [1, 7]]).propose([1], 1) == [5]
    assert SuffixDrafter([[1, 5], [1, 9], [1, 9]]).propose([1], 1) == [9]


def test_a_suffix_that_nothing_followed_gives_way_to_a_shorter_one() -> None:
    drafter = SuffixDrafter([[1, 2, 3], [3, 4]])
    assert drafter.longest_match([2, 3]) == 2
    assert drafter.propose([2, 3], 2) == [4]


def test_every_int32_is_a_token() -> None:
    low, high = INT32_LIMITS
    drafter = SuffixDrafter([[low, -1, 0, high, low]])
    assert drafter.propose([low, -1], 3) == [0, high, low]
    with pytest.raises(OverflowError):
        drafter.add([high + 1])


@pytest.mark.parametrize(
    "tokens",
    [np.zeros(4, dtype=np.int64), np.zeros(8, dtype=np.int32)[::2]],
    ids=["other dtype", "strided"],
)
def test_an_array_that_would_need_a_copy_is_refused(tokens: np.ndarray) -> None:
    with pytest.raises(TypeError):
        SuffixDrafter().add(tokens)


def test_an_array_of_two_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match="one-dimensional, got 2 dimensions"):
        SuffixDrafter().add(np.zeros((2, 2), dtype=np.int32))


def test_memory_grows_with_what_is_learned() -> None:
    random = np.random.default_rng(0)
    drafter = SuffixDrafter()
    empty = drafter.memory_bytes
    drafter.add(random.integers(0, 1000, 10_000, dtype=np.int32))
    assert 10_000 * 20 < drafter.memory_bytes - empty < 10_000 * 150


def test_queries_see_whole_states_while_another_thread_learns() -> None:
    """In a cycle there is one answer at any time; a torn read would give another or crash."""
    cycle = np.tile(np.arange(50, dtype=np.int32), 20)
    drafter = SuffixDrafter([cycle])
    drafts: list[list[int]] = []

    def ask() -> None:
        for _ in range(2000):
            drafts.append(drafter.propose(cycle[:10], 5))

    readers = [threading.Thread(target=ask) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(200):
        drafter.add(cycle)
    for reader in readers:
        reader.join()
    assert len(drafts) == 4000
    assert all(draft == [10, 11, 12, 13, 14] for draft in drafts)


def test_learning_releases_the_gil() -> None:
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.005):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    SuffixDrafter().add(np.zeros(200_000, dtype=np.int32))  # the slowest text there is
    end = time.perf_counter()
    done.set()
    ticker.join()
    inside = [moment for moment in ticks if start + 0.02 < moment < end - 0.02]
    assert len(inside) >= 2, f"{len(inside)} ticks in {end - start:.2f} s"
