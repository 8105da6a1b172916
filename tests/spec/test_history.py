"""The history against a brute-force model of what it promises to know and to draft."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.spec.history import History
from tests.spec.history_model import PROBLEMS, Model, draft_for, stories


@given(stories(), st.integers(1, 3), st.integers(1, 6))
def test_drafts_are_those_of_a_search_through_the_text(
    story: list[tuple[object, ...]], window: int, max_match: int
) -> None:
    history = History(window=window)
    reader = history.reader(max_match=max_match, decay=0.5)
    models = {problem: Model(window) for problem in PROBLEMS}
    requests = [reader.open(problem) for problem in PROBLEMS]
    contexts: list[list[int]] = [[] for _ in PROBLEMS]
    for number, (event, *arguments) in enumerate(story):
        if event == "propose":
            (grown,) = arguments
            drafts = reader.propose(requests, grown, 5)
            for row, problem in enumerate(PROBLEMS):
                contexts[row] += grown[row]
                match, draft, probabilities = models[problem].propose(
                    contexts[row], 5, max_match, 0.5
                )
                assert drafts.matches[row] == match
                assert drafts.of(row) == draft
                size = drafts.num_tokens[row]
                assert drafts.probabilities[row, :size] == pytest.approx(probabilities)
        elif event == "forget":
            history.forget(*arguments)
            for model in models.values():
                model.forget(*arguments)
        else:
            problem, generation, *rest = arguments
            if event == "add":
                history.add(problem, generation, *rest)
                known = models[problem].of(generation)
                if known is not None:
                    known[f"ended {number}"] = list(*rest)
            elif event == "extend":
                name, grown = rest
                history.extend(problem, generation, name, grown)
                known = models[problem].of(generation)
                if known is not None:
                    known.setdefault(name, []).extend(grown)
            else:
                history.end_sequence(problem, generation, *rest)
                known = models[problem].generations.get(generation, {})
                known[f"ended {number}"] = known.pop(rest[0], [])
    for problem, model in models.items():
        summaries = [each for each in history.summaries() if each.problem == problem]
        assert [each.generation for each in summaries] == sorted(model.generations)
        for each in summaries:
            texts = [text.tolist() for text in history.sequences(problem, each.generation)]
            wanted = [text for text in model.generations[each.generation].values() if text]
            assert sorted(texts) == sorted(wanted)
            assert each.num_tokens == sum(map(len, wanted))
    assert history.num_tokens == sum(each.num_tokens for each in history.summaries())


def test_newer_generations_outvote_older_ones_until_those_are_many() -> None:
    history = History()
    history.add("p", 0, [1, 2])
    history.add("p", 1, [1, 3])
    reader = history.reader(decay=0.5)
    assert draft_for(reader, "p", [1]).of(0) == [3]
    assert draft_for(reader, "p", [1]).generations[0] == 1
    history.add("p", 0, [1, 2])
    assert draft_for(reader, "p", [1]).of(0) == [3], "on a tie the newer one's"
    history.add("p", 0, [1, 2])
    drafts = draft_for(reader, "p", [1])
    assert drafts.of(0) == [2]
    assert drafts.generations[0] == 0
    assert drafts.probabilities[0, 0] == pytest.approx(1.5 / 2.5)


def test_problems_share_nothing() -> None:
    history = History()
    history.add("p", 0, [1, 2, 3])
    assert draft_for(history.reader(), "q", [1]).of(0) == []


def test_a_draft_ends_before_it_is_too_unlikely() -> None:
    history = History()
    for last in (3, 3, 4, 5):
        history.add("p", 0, [1, 2, last, 6])
    reader = history.reader()
    assert draft_for(reader, "p", [1], min_probability=0.5).of(0) == [2, 3, 6]
    assert draft_for(reader, "p", [1], min_probability=0.51).of(0) == [2]


def test_a_sibling_that_grows_is_followed_at_once() -> None:
    history = History()
    reader = history.reader()
    request = reader.open("p")
    assert reader.propose([request], [[7, 1, 2]], 4).of(0) == []
    history.extend("p", 3, "sibling", [7, 1, 2, 5])
    assert reader.propose([request], [[]], 4).of(0) == [5]
    history.extend("p", 3, "sibling", [6])
    assert reader.propose([request], [[5]], 4).of(0) == [6]
    assert reader.propose([request], [[6]], 4).of(0) == []


def test_a_batch_takes_a_draft_length_for_each_request_and_zero_is_one() -> None:
    history = History()
    history.add("p", 0, [1, 2, 3, 4, 5])
    reader = history.reader()
    requests = [reader.open("p") for _ in range(3)]
    drafts = reader.propose(requests, [[1], [2], [1]], [2, 0, 4])
    assert drafts.tokens.tolist() == [[2, 3, -1, -1], [-1] * 4, [2, 3, 4, 5]]
    assert drafts.num_tokens.tolist() == [2, 0, 4]
    assert drafts.generations.tolist() == [0, -1, 0]


@pytest.mark.parametrize("seed", range(8))
def test_long_matches_are_found_in_whole_however_text_and_history_grow(seed: int) -> None:
    random = np.random.default_rng(seed)
    text = random.integers(0, 4, 400, np.int32).tolist()
    history, model = History(), Model(16)
    reader = history.reader(max_match=20, decay=0.5)
    request = reader.open("p")
    context: list[int] = []
    longest = 0
    for turn in range(60):
        generation = int(random.integers(0, 3))
        start, size = random.integers(0, 360), random.integers(1, 40)
        learned = text[start : start + size]
        history.extend("p", generation, "a", learned)
        of = model.of(generation)
        assert of is not None
        of.setdefault("a", []).extend(learned)
        start, size = random.integers(0, 360), int(random.choice([0, 1, 2, 12, 30]))
        grown = text[start : start + size] if turn % 3 else text[len(context) :][:size]
        context += grown
        drafts = reader.propose([request], [grown], 5)
        match, draft, _ = model.propose(context, 5, 20, 0.5)
        assert drafts.matches[0] == match
        assert drafts.of(0) == draft
        longest = max(longest, match)
    assert longest == 20


def test_requests_of_a_large_batch_are_followed_as_each_alone() -> None:
    random = np.random.default_rng(0)
    texts = random.integers(0, 6, (5, 8, 300), np.int32)
    texts[3:, :, :150] = texts[1:3, :, 60:210]  # matches longer than `max_match`
    history = History()
    for generation in range(4):
        for sequence in texts[generation]:
            history.add("p", generation, sequence)
    reader = history.reader(max_match=24)
    requests = [reader.open("p") for _ in texts[4]]
    lone = [history.reader(max_match=24) for _ in requests]
    for reader_of_one in lone:
        reader_of_one.open("p")
    ends = np.zeros(len(requests), int)
    while (ends < 260).all():
        grown = random.integers(0, 40, len(requests))  # from nothing to more than `max_match`
        new = [
            texts[4, row, end : end + n]
            for row, (end, n) in enumerate(zip(ends, grown, strict=True))
        ]
        together = reader.propose(requests, new, 6)
        for row, reader_of_one in enumerate(lone):
            alone = reader_of_one.propose([0], [new[row]], 6)
            assert together.of(row) == alone.of(0)
            assert together.matches[row] == alone.matches[0]
        ends += grown


def test_a_wrong_batch_is_refused_and_moves_no_request() -> None:
    history = History()
    history.add("p", 0, [1, 2, 3])
    reader = history.reader()
    request = reader.open("p")
    with pytest.raises(ValueError, match="request 9 is not open"):
        reader.propose([request, 9], [[1], [1]], 2)
    with pytest.raises(ValueError, match="1 requests and tokens of 2"):
        reader.propose([request], [[1], [1]], 2)
    with pytest.raises(ValueError, match="request 0 is named twice"):
        reader.propose([request, request], [[1], [1]], 2)
    with pytest.raises(ValueError, match="negative"):
        reader.propose([request], [[1]], -1)
    with pytest.raises(ValueError, match="adds up to 2, but 1"):
        reader.propose_flat(
            np.array([request]),
            np.array([1], np.int32),
            np.array([2], np.int32),
            np.array([2], np.int32),
        )
    assert reader.propose([request], [[2]], 2).matches[0] == 1
    reader.close(request)
    with pytest.raises(ValueError, match="not open"):
        reader.close(request)
    with pytest.raises(ValueError, match="min_match"):
        history.reader(min_match=3, max_match=2)
