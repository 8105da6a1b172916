"""The archive stays within its bounds, and what leaves it leaves whole."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.vocabulary import Trace
from paceline.controller.drafts.corpus import TraceArchive


def trace(prompt: int, version: int, length: int) -> Trace:
    return Trace((prompt,), version, np.full(length, version, dtype=np.int32))


traces = st.builds(trace, st.integers(0, 3), st.integers(-1, 6), st.integers(0, 9))


def sizes(found: list[Trace]) -> Counter[tuple[tuple[int, ...], int]]:
    """Traces of each prompt and version."""
    return Counter((each.prompt_token_ids, each.version) for each in found)


@given(st.lists(traces, max_size=60), st.integers(1, 3), st.integers(0, 60))
def test_it_stays_within_its_window_and_its_tokens(
    given_traces: list[Trace], window: int, max_tokens: int
) -> None:
    archive = TraceArchive(window, max_tokens)
    for each in given_traces:
        archive.add([each])
        kept = list(archive)
        versions = defaultdict(set)
        for one in kept:
            versions[one.prompt_token_ids].add(one.version)
        assert all(len(of_prompt) <= window for of_prompt in versions.values())
        assert archive.num_tokens == sum(len(one.token_ids) for one in kept) <= max_tokens
        assert [one.version for one in kept] == sorted(one.version for one in kept)


@given(st.lists(st.lists(traces, max_size=8), max_size=8), st.integers(1, 3), st.integers(0, 60))
def test_in_order_of_versions_a_prompts_versions_are_kept_whole_or_not_at_all(
    steps: list[list[Trace]], window: int, max_tokens: int
) -> None:
    """As in a run; only a version that has no room by itself loses traces and gets others."""
    archive = TraceArchive(window, max_tokens)
    everything = []
    for version, step in enumerate(steps):
        step = [Trace(each.prompt_token_ids, version, each.token_ids) for each in step]
        archive.add(step)
        everything += step
    added, kept = sizes(everything), sizes(list(archive))
    for (prompt, version), count in kept.items():
        if sum(len(each.token_ids) for each in everything if each.version == version) <= max_tokens:
            assert count == added[prompt, version]


@given(st.lists(traces, max_size=30), st.integers(1, 3))
def test_the_newest_versions_of_a_prompt_are_what_is_kept(
    given_traces: list[Trace], window: int
) -> None:
    archive = TraceArchive(window, 10**9)
    archive.add(given_traces)
    seen = defaultdict(set)
    for each in given_traces:
        seen[each.prompt_token_ids].add(each.version)
    kept = defaultdict(set)
    for each in archive:
        kept[each.prompt_token_ids].add(each.version)
    for prompt, versions in seen.items():
        assert max(versions) in kept[prompt]
        if len(versions) <= window:
            assert kept[prompt] == versions


@given(st.lists(traces, max_size=30), st.integers(-1, 7))
def test_what_is_forgotten_does_not_come_back(given_traces: list[Trace], before: int) -> None:
    archive = TraceArchive(16, 10**9)
    archive.add(given_traces)
    archive.forget(before)
    archive.add(given_traces)
    assert all(each.version >= before for each in archive)
    expected = Counter({key: 2 * n for key, n in sizes(given_traces).items() if key[1] >= before})
    assert sizes(list(archive)) == expected


def test_without_room_the_oldest_version_of_any_prompt_goes_first() -> None:
    archive = TraceArchive(16, 10)
    archive.add([trace(1, 5, 4), trace(2, 3, 4), trace(3, 4, 4)])
    assert sizes(list(archive)) == {((1,), 5): 1, ((3,), 4): 1}
    archive.add([trace(3, 2, 9)])
    assert sizes(list(archive)) == {((1,), 5): 1, ((3,), 4): 1}


def test_it_does_not_hold_on_to_what_it_was_given_parts_of() -> None:
    whole = np.arange(1000, dtype=np.int32)
    archive = TraceArchive(1, 10)
    archive.add([Trace((1,), 0, whole[:3])])
    (kept,) = archive
    assert kept.token_ids.base is None
    assert kept.token_ids.tolist() == [0, 1, 2]


@given(st.lists(traces, max_size=20), st.lists(traces, max_size=20))
def test_what_is_missing_is_added_and_what_is_there_is_not_added_again(
    some: list[Trace], others: list[Trace]
) -> None:
    def contents(found: list[Trace]) -> Counter[tuple[tuple[int, ...], int, bytes]]:
        return Counter((t.prompt_token_ids, t.version, t.token_ids.tobytes()) for t in found)

    archive = TraceArchive(16, 10**9)
    archive.add(some)
    archive.add_missing(others)
    assert contents(list(archive)) == contents(some) | contents(others)
