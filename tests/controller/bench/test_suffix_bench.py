"""The benchmark of drafters replays what was sampled, and its streams are what it says."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from paceline.controller.bench.harness.result import BenchError
from paceline.controller.bench.suffix.drafters import MAX_DRAFT, Drafted
from paceline.controller.bench.suffix.replay import Replay, num_right, replay
from paceline.controller.bench.suffix.streams import COPIED, Rollouts, recorded, synthetic
from paceline.controller.bench.suffix.suffix import (
    ACCEPTED,
    ARCTIC,
    MEMORY,
    OURS,
    Size,
    bench_suffix,
    measure,
)

TINY = Size(num_problems=10, num_generations=3, num_samples=8, length=64)
HAS_PEER = importlib.util.find_spec("arctic_inference") is not None


class Oracle:
    """Knows what each request will be; every other draft of it is wrong from its third token on."""

    def __init__(self, rollouts: Rollouts, always_right: bool) -> None:
        self._waiting = {
            problem: list(group)
            for problem, group in enumerate(rollouts.tokens[rollouts.num_known])
        }
        self._always_right = always_right
        self._will_be: list[list[int]] = []
        self.texts: list[list[int]] = []
        self.open_now: set[int] = set()
        self.most_open = 0

    def open(self, problem, generation, prompt):
        self._will_be.append(self._waiting[int(problem)].pop(0).tolist())
        self.texts.append([])
        request = len(self.texts) - 1
        self.open_now.add(request)
        self.most_open = max(self.most_open, len(self.open_now))
        return request

    def sampled(self, request, tokens):
        self.texts[request] += tokens.tolist()

    def propose(self, requests):
        drafts = []
        for request in requests:
            known = len(self.texts[request])
            draft = self._will_be[request][known : known + MAX_DRAFT]
            if not self._always_right:
                draft[2:] = [-1] * len(draft[2:])
            drafts.append(draft)
        return Drafted(drafts, 0.001)

    def close(self, request):
        self.open_now.remove(request)


@pytest.mark.parametrize("always_right", [True, False])
def test_a_replay_samples_what_was_sampled_whatever_is_drafted(always_right):
    rollouts = synthetic(3, 2, 4, 50, seed=1)
    oracle, found = Oracle(rollouts, always_right), Replay()
    replay(oracle, rollouts, 1, range(3), 5, found)
    wanted = [sample.tolist() for group in rollouts.tokens[1] for sample in group]
    assert sorted(oracle.texts) == sorted(wanted)
    assert oracle.open_now == set()
    assert oracle.most_open == 5
    # The first token comes with the prompt, and each round yields one beside those accepted.
    assert found.num_rounds + found.num_accepted == 12 * 49
    if always_right:
        assert found.num_accepted == found.num_drafted == 12 * (5 * MAX_DRAFT + 3)
    else:
        assert (found.num_rounds, found.num_accepted) == (12 * 17, 12 * 16 * 2)
    assert set(found.microseconds) == {1e6 * 0.001 / 5}


def test_right_are_the_tokens_before_the_first_wrong_one():
    text = np.array([5, 6, 7], np.int32)
    assert [num_right(draft, text) for draft in ([5, 6, 7, 8], [5, 9, 7], [9], [])] == [3, 1, 0, 0]


def test_streams_are_the_same_by_seed_and_share_nothing_between_problems():
    streams = synthetic(3, 2, 4, 500, seed=7)
    again = synthetic(3, 2, 4, 500, seed=7)
    other = synthetic(3, 2, 4, 500, seed=8)
    assert np.array_equal(streams.tokens, again.tokens)
    assert not np.array_equal(streams.tokens, other.tokens)
    assert np.shape(streams.tokens) == (2, 3, 4, 500)
    ours, theirs = (eights(np.array(streams.tokens)[:, problem].ravel()) for problem in (0, 1))
    assert len(set(ours) & set(theirs)) < 0.01 * len(ours)


def test_streams_copy_about_as_much_as_they_say():
    text = np.array(synthetic(1, 4, 8, 1000, seed=3).tokens).ravel()
    seen: set[bytes] = set()
    repeated = 0
    for eight in eights(text):
        repeated += eight in seen
        seen.add(eight)
    share = repeated / (text.size - 7)
    # An eight that begins or ends outside of a copied piece is new: 7 of a piece of 40.
    assert COPIED * (1 - 7 / 40) - 0.08 < share < COPIED + 0.03


def eights(text: np.ndarray) -> list[bytes]:
    return [text[at : at + 8].tobytes() for at in range(text.size - 7)]


def test_the_recording_is_whole():
    rollouts = recorded()
    assert (rollouts.num_generations, rollouts.num_problems, rollouts.num_known) == (8, 24, 4)
    samples = [sample for of in rollouts.tokens for group in of for sample in group]
    assert len(samples) == 8 * 24 * 8
    assert all(sample[-1] == 1 or sample.size == 160 for sample in samples), "ended or cut off"
    assert all(sample.dtype == np.int32 and sample.max() < 128 for sample in samples)
    assert all(bytes(prompt.astype(np.uint8)).endswith(b"=") for prompt in rollouts.prompts)


def test_the_native_drafter_is_measured_on_both_kinds_of_rollouts():
    for size in (TINY, None):
        found = measure(OURS, size)
        assert 0 < found[ACCEPTED] <= found["drafted a round"] <= MAX_DRAFT
        assert 0 < found["propose, p50"] <= found["propose, p99"]
        assert 0 < found["propose alone, p50"] <= found["propose alone, p99"]
        assert found["insert"] > 0
        assert found["evict"] > 0
        assert found[MEMORY] is None, "too few tokens to tell"


@pytest.mark.skipif(HAS_PEER, reason="arctic-inference is installed")
def test_without_the_peer_it_says_how_to_install_it(tmp_path):
    with pytest.raises(BenchError, match=r"arctic-inference, .*: pip install 'paceline\[bench\]'"):
        bench_suffix(True, tmp_path)


@pytest.mark.skipif(not HAS_PEER, reason="arctic-inference is not installed: extra `bench`")
def test_the_peer_is_measured_on_the_same_rollouts():
    ours, theirs = measure(OURS, TINY), measure(ARCTIC, TINY)
    assert ours["tokens known"] == theirs["tokens known"]
    assert 0 < theirs[ACCEPTED] <= theirs["drafted a round"] <= MAX_DRAFT
