"""The history against a brute-force model of what it promises to know and to draft."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.spec.history import Drafts, History, Reader

PROBLEMS = ("red", "blue")
tokens = st.lists(st.integers(0, 2), max_size=10)


def count(sequences: list[list[int]], text: Sequence[int]) -> int:
    wanted, size = list(text), len(text)
    return sum(
        sequence[start : start + size] == wanted
        for sequence in sequences
        for start in range(len(sequence) - size + 1)
    )


def favourite(sequences: list[list[int]], text: Sequence[int]) -> int | None:
    """What most often follows the text, the smallest token on a tie."""
    following = Counter(
        sequence[start + len(text)]
        for sequence in sequences
        for start in range(len(sequence) - len(text))
        if sequence[start : start + len(text)] == list(text)
    )
    return min(following, key=lambda token: (-following[token], token), default=None)


@dataclass
class Model:
    """A window of generations of one problem, each a list of sequences, searched by hand."""

    window: int
    generations: dict[int, dict[str, list[int]]] = field(default_factory=dict)
    first_allowed: int = -100
    forgotten: int = -100

    def of(self, number: int) -> dict[str, list[int]] | None:
        """The generation to write to, if there is a place for it."""
        if number not in self.generations:
            oldest = min(self.generations, default=number)
            is_full = len(self.generations) == self.window
            if number < max(self.first_allowed, self.forgotten) or (is_full and number < oldest):
                return None
            if is_full:
                self.drop(oldest)
            self.generations[number] = {}
        return self.generations[number]

    def drop(self, number: int) -> None:
        del self.generations[number]
        # Of a problem of which nothing is left, nothing is remembered either.
        self.first_allowed = number + 1 if self.generations else -100

    def forget(self, before: int) -> None:
        self.forgotten = max(self.forgotten, before)
        for number in sorted(self.generations):
            if number < before:
                self.drop(number)

    def propose(
        self, context: list[int], max_draft: int, max_match: int, decay: float
    ) -> tuple[int, list[int], list[float]]:
        voters: list[tuple[list[list[int]], float, list[int]]] = []
        longest = 1
        for age, number in enumerate(sorted(self.generations, reverse=True)):
            sequences = list(self.generations[number].values())
            for size in range(min(len(context), max_match), longest - 1, -1):
                suffix = context[-size:]
                if favourite(sequences, suffix) is not None:
                    voters = voters if size == longest else []
                    longest = size
                    voters.append((sequences, decay**age, suffix))
                    break
        match = longest if voters else 0
        draft: list[int] = []
        probabilities: list[float] = []
        while len(draft) < max_draft:
            votes: dict[int, float] = {}
            choices = [favourite(sequences, text) for sequences, _, text in voters]
            for (sequences, weight, text), choice in zip(voters, choices, strict=True):
                if choice is not None:
                    votes[choice] = votes.get(choice, 0) + weight * count(
                        sequences, [*text, choice]
                    )
            if not votes:
                break
            winner = max(
                votes, key=lambda token: votes[token]
            )  # the first, so the newest, on a tie
            everything = sum(weight * count(sequences, text) for sequences, weight, text in voters)
            draft.append(winner)
            probabilities.append(votes[winner] / everything)
            voters = [
                (sequences, weight, [*text, winner])
                for (sequences, weight, text), choice in zip(voters, choices, strict=True)
                if choice == winner
            ]
        return match, draft, probabilities


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[object, ...]]:
    """Learning, forgetting and drafting, as they may follow each other."""
    generation = st.integers(0, 5)
    problem = st.sampled_from(PROBLEMS)
    name = st.sampled_from(["a", "b"])
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("add"), problem, generation, tokens),
                st.tuples(st.just("extend"), problem, generation, name, tokens),
                st.tuples(st.just("end"), problem, generation, name),
                st.tuples(st.just("forget"), generation),
                st.tuples(st.just("propose"), st.lists(tokens, min_size=2, max_size=2)),
            ),
            max_size=25,
        )
    )


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


def draft_for(reader: Reader, problem: str, context: list[int], **options: object) -> Drafts:
    request = reader.open(problem)
    try:
        return reader.propose([request], [context], 8, **options)  # type: ignore[arg-type]
    finally:
        reader.close(request)


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


@pytest.mark.parametrize("num_problems", [1, 7])
def test_memory_never_exceeds_its_cap_and_the_oldest_go_first(num_problems: int) -> None:
    cap = 700_000 * num_problems
    history = History(window=100, max_bytes=cap)
    random = np.random.default_rng(0)
    for generation in range(12):
        for problem in range(num_problems):
            for _ in range(4):
                history.add(str(problem), generation, random.integers(0, 99, 700, np.int32))
                assert history.memory_bytes <= cap
    assert history.num_dropped_generations > 0
    assert history.memory_bytes > cap / 2, "no more than needed was dropped"
    for problem in range(num_problems):
        kept = [each.generation for each in history.summaries() if each.problem == str(problem)]
        assert kept == list(range(kept[0], 12)), "the newest, without gaps"
    held = sum(each.memory_bytes for each in history.summaries())
    assert 0.9 * held < history.memory_bytes <= 1.01 * held
    history.forget(100)
    history.add("another", 100, [1])
    assert history.memory_bytes < 20_000, "everything came back"


def test_a_generation_that_outgrows_the_cap_alone_makes_way() -> None:
    history = History(max_bytes=200_000)
    endless = np.random.default_rng(0).integers(0, 99, 100_000, np.int32)
    history.extend("p", 5, "a", endless)
    assert history.memory_bytes <= 200_000
    assert history.num_refused_tokens > 90_000
    history.add("p", 6, [1, 2, 3])
    assert draft_for(history.reader(), "p", [1, 2]).of(0) == [3]


def test_a_problem_is_forgotten_when_nobody_needs_it() -> None:
    history = History(window=1)
    reader = history.reader()
    request = reader.open("p")
    assert history.num_problems == 1
    history.add("p", 0, [1, 2])
    reader.close(request)
    assert history.num_problems == 1
    history.forget(1)
    assert history.num_problems == 0
    requests = [reader.open("q"), reader.open("q")]
    history.add("q", 1, [1, 2])
    history.add("q", 0, [1, 3])
    history.forget(2)
    reader.close(requests[0])
    assert history.num_problems == 1
    history.add("q", 2, [1, 4])
    assert reader.propose(requests[1:], [[1]], 2).of(0) == [4], "known again, and found"
    del reader
    history.forget(3)
    assert history.num_problems == 0
    history.end_sequence("q", 3, "never opened")
    assert history.sequences("q", 3) == []
    assert history.num_problems == 0


def test_what_was_forgotten_is_not_learned_again() -> None:
    history = History()
    history.forget(5)
    history.add("p", 4, [1, 2])
    assert history.num_tokens == 0
    assert history.num_refused_tokens == 2
    history.add("p", 5, [1, 2])
    assert history.num_tokens == 2


def test_a_text_that_repeats_itself_is_learned_in_linear_time() -> None:
    """Every suffix of a run is a class of its own: counting them all is quadratic, minutes here."""
    history = History()
    history.add("p", 0, np.zeros(100_000, np.int32))
    assert draft_for(history.reader(), "p", [0] * 5).of(0) == [0] * 8


def test_readers_draft_what_was_learned_while_a_writer_learns_and_forgets() -> None:
    """Every problem has one cycle, so whatever a reader sees, there is one answer or none."""
    problems = [str(number) for number in range(4)]
    cycles = {name: np.arange(40, dtype=np.int32) + 100 * int(name) for name in problems}
    history = History(window=2, max_bytes=600_000)
    done = threading.Event()
    wrong: list[object] = []
    drafted = [0, 0, 0]

    def read(index: int) -> None:
        reader = history.reader(max_match=8)
        while not done.is_set():
            requests = [reader.open(name) for name in problems]
            for turn in range(10):
                grown = [cycles[name][4 * turn : 4 * turn + 4] for name in problems]
                drafts = reader.propose(requests, grown, 3)
                for row, name in enumerate(problems):
                    following = [(4 * turn + 4 + i) % 40 + 100 * int(name) for i in range(3)]
                    draft = drafts.of(row)
                    drafted[index] += len(draft)
                    if draft != following[: len(draft)]:
                        wrong.append((name, turn, draft))
            for request in requests:
                reader.close(request)

    readers = [threading.Thread(target=read, args=(index,)) for index in range(len(drafted))]
    for thread in readers:
        thread.start()
    for generation in range(60):
        for name in problems:
            for piece in np.tile(cycles[name], 12).reshape(-1, 16):
                history.extend(name, generation, "sibling", piece)
            history.end_sequence(name, generation, "sibling")
        if generation % 10 == 9:
            history.forget(generation)
    done.set()
    for thread in readers:
        thread.join()
    assert wrong == []
    assert all(count > 0 for count in drafted)
    assert history.memory_bytes <= 600_000


def test_one_reader_is_for_one_thread() -> None:
    history = History()
    history.add("p", 0, np.arange(1000, dtype=np.int32))
    reader = history.reader()
    requests = np.array([reader.open("p") for _ in range(2000)])
    lengths = np.full(2000, 100, np.int32)
    text = np.tile(np.arange(100, dtype=np.int32), 2000)
    refused: list[str] = []

    def ask() -> None:
        for _ in range(20):
            try:
                reader.propose_flat(requests, text, lengths, lengths)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused
    assert set(refused) == {"two threads use one reader: give each its own"}


def test_every_int32_is_a_token() -> None:
    low, high = -(2**31), 2**31 - 1
    history = History()
    history.add("red", 0, [low, -1, 0, high, low])
    reader = history.reader()
    drafts = reader.propose([reader.open("red")], [[low, -1]], 3)
    assert drafts.of(0) == [0, high, low]
    with pytest.raises(OverflowError):
        history.add("red", 0, [high + 1])


@pytest.mark.parametrize(
    "array",
    [np.zeros(4, dtype=np.int64), np.zeros(8, dtype=np.int32)[::2]],
    ids=["other dtype", "strided"],
)
def test_an_array_that_would_need_a_copy_is_refused(array: np.ndarray) -> None:
    with pytest.raises(TypeError):
        History().add("red", 0, array)


def test_an_array_of_two_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match="one-dimensional, got 2 dimensions"):
        History().add("red", 0, np.zeros((2, 2), dtype=np.int32))


def test_learning_releases_the_gil() -> None:
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.005):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    History().add("red", 0, np.zeros(200_000, dtype=np.int32))  # the slowest text there is
    end = time.perf_counter()
    done.set()
    ticker.join()
    inside = [moment for moment in ticks if start + 0.02 < moment < end - 0.02]
    assert len(inside) >= 2, f"{len(inside)} ticks in {end - start:.2f} s"
