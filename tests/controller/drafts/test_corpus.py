"""The corpus stays within its bounds, and what leaves it leaves whole."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.vocabulary import DraftText
from paceline.controller.drafts.corpus import DraftCorpus


def draft_text(prompt: int, version: int, length: int) -> DraftText:
    return DraftText((prompt,), version, np.full(length, version, dtype=np.int32))


texts = st.builds(draft_text, st.integers(0, 3), st.integers(-1, 6), st.integers(0, 9))


def sizes(found: list[DraftText]) -> Counter[tuple[tuple[int, ...], int]]:
    """Texts of each prompt and version."""
    return Counter((each.prompt_token_ids, each.version) for each in found)


@given(st.lists(texts, max_size=60), st.integers(1, 3), st.integers(0, 60))
def test_it_stays_within_its_window_and_its_tokens(
    added: list[DraftText], window: int, max_tokens: int
) -> None:
    corpus = DraftCorpus(window, max_tokens)
    for each in added:
        corpus.add([each])
        kept = list(corpus)
        versions = defaultdict(set)
        for one in kept:
            versions[one.prompt_token_ids].add(one.version)
        assert all(len(of_prompt) <= window for of_prompt in versions.values())
        assert corpus.num_tokens == sum(len(one.token_ids) for one in kept) <= max_tokens
        assert [one.version for one in kept] == sorted(one.version for one in kept)


@given(st.lists(st.lists(texts, max_size=8), max_size=8), st.integers(1, 3), st.integers(0, 60))
def test_in_order_of_versions_a_prompts_versions_are_kept_whole_or_not_at_all(
    steps: list[list[DraftText]], window: int, max_tokens: int
) -> None:
    """As in a run; only a version that has no room by itself loses texts and gets others."""
    corpus = DraftCorpus(window, max_tokens)
    everything = []
    for version, step in enumerate(steps):
        step = [DraftText(each.prompt_token_ids, version, each.token_ids) for each in step]
        corpus.add(step)
        everything += step
    added, kept = sizes(everything), sizes(list(corpus))
    for (prompt, version), count in kept.items():
        if sum(len(each.token_ids) for each in everything if each.version == version) <= max_tokens:
            assert count == added[prompt, version]


@given(st.lists(texts, max_size=30), st.integers(1, 3))
def test_the_newest_versions_of_a_prompt_are_what_is_kept(
    added: list[DraftText], window: int
) -> None:
    corpus = DraftCorpus(window, 10**9)
    corpus.add(added)
    seen = defaultdict(set)
    for each in added:
        seen[each.prompt_token_ids].add(each.version)
    kept = defaultdict(set)
    for each in corpus:
        kept[each.prompt_token_ids].add(each.version)
    for prompt, versions in seen.items():
        assert max(versions) in kept[prompt]
        if len(versions) <= window:
            assert kept[prompt] == versions


@given(st.lists(texts, max_size=30), st.integers(-1, 7))
def test_what_is_forgotten_does_not_come_back(added: list[DraftText], before: int) -> None:
    corpus = DraftCorpus(16, 10**9)
    corpus.add(added)
    corpus.drop_before(before)
    corpus.add(added)
    assert all(each.version >= before for each in corpus)
    expected = Counter({key: 2 * n for key, n in sizes(added).items() if key[1] >= before})
    assert sizes(list(corpus)) == expected


def test_without_room_the_oldest_version_of_any_prompt_goes_first() -> None:
    corpus = DraftCorpus(16, 10)
    corpus.add([draft_text(1, 5, 4), draft_text(2, 3, 4), draft_text(3, 4, 4)])
    assert sizes(list(corpus)) == {((1,), 5): 1, ((3,), 4): 1}
    corpus.add([draft_text(3, 2, 9)])
    assert sizes(list(corpus)) == {((1,), 5): 1, ((3,), 4): 1}


def test_it_does_not_hold_on_to_what_it_was_given_parts_of() -> None:
    whole = np.arange(1000, dtype=np.int32)
    corpus = DraftCorpus(1, 10)
    corpus.add([DraftText((1,), 0, whole[:3])])
    (kept,) = corpus
    assert kept.token_ids.base is None
    assert kept.token_ids.tolist() == [0, 1, 2]


@given(st.lists(texts, max_size=20), st.lists(texts, max_size=20))
def test_what_is_missing_is_added_and_what_is_there_is_not_added_again(
    some: list[DraftText], others: list[DraftText]
) -> None:
    def contents(found: list[DraftText]) -> Counter[tuple[tuple[int, ...], int, bytes]]:
        return Counter((t.prompt_token_ids, t.version, t.token_ids.tobytes()) for t in found)

    corpus = DraftCorpus(16, 10**9)
    corpus.add(some)
    corpus.add_missing(others)
    assert contents(list(corpus)) == contents(some) | contents(others)
