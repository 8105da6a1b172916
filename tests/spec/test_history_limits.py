"""The history's memory, what it forgets, its threads, and what it refuses."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from paceline.spec.history import History
from tests.spec.history_model import draft_for


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
