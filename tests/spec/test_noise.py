"""Noise is random where it should be, the same everywhere, and drafts are what it prefers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline.spec.history import History
from paceline.spec.noise import draw, gumbel, position_streams
from tests.spec.history_model import count

NUM_DRAWS = 200_000
SUSPICIOUS = 1e-4
"""A probability under which a test of right noise fails once in ten thousand versions of it."""

int64 = st.integers(-(2**63), 2**63 - 1)


def bits_of(seeds: object, positions: object, tokens: object) -> NDArray[np.int64]:
    """Random bits of every triple; arguments broadcast."""
    arrays = np.broadcast_arrays(*(np.asarray(x, np.int64) for x in (seeds, positions, tokens)))
    seeds, positions, tokens = (array.ravel() for array in arrays)
    return draw(position_streams(seeds, positions), tokens)


def uniforms(bits: NDArray[np.int64]) -> NDArray[np.float64]:
    return bits.view(np.uint64).astype(np.float64) / 2.0**64


def chi_square_probability(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """How often right noise is at least this far off."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor([(counts.size - 1) / 2.0, statistic / 2.0], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


STREAMS = {
    "of a seed at one position": bits_of(5, 11, np.arange(NUM_DRAWS)),
    "of one token at all positions": bits_of(5, np.arange(NUM_DRAWS), 17),
    "of one token for seeds in a row": bits_of(np.arange(NUM_DRAWS), 11, 17),
    "where all three count": bits_of(*(np.arange(NUM_DRAWS),) * 3),
}


def test_bits_are_those_of_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state = np.full(3, 1234567, np.int64)
    assert draw(state, np.arange(3)).view(np.uint64).tolist() == published
    first_of_zero = draw(np.zeros(1, np.int64), np.zeros(1, np.int64)).view(np.uint64)
    assert first_of_zero.tolist() == [0xE220A8397B1DCDAF]


def test_noise_of_a_known_place_stays_what_it_was() -> None:
    """Else a run that is resumed by a newer version would go on with other samples."""
    streams = position_streams(np.array([3, 4]), np.array([7, 9]))
    assert streams.tolist() == [-852949688519972690, -2250115517460040312]
    known = [
        [-1.0492760888364834, 1.8281737334551909, 0.8796493404254986],
        [-0.5043915274624864, -0.3118973602340039, 1.446215400350966],
    ]
    np.testing.assert_allclose(gumbel(streams[:, None], np.arange(3)[None]), known, rtol=1e-12)


@given(st.lists(st.tuples(int64, int64, int64), min_size=1, max_size=20))
def test_torch_draws_the_same_bits(triples: list[tuple[int, int, int]]) -> None:
    seeds, positions, tokens = np.array(triples, np.int64).T.copy()
    by_torch = draw(
        position_streams(torch.tensor(seeds), torch.tensor(positions)), torch.tensor(tokens)
    )
    assert by_torch.tolist() == bits_of(seeds, positions, tokens).tolist()


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("shift", [0, 12, 56])
def test_bytes_are_uniform(name: str, shift: int) -> None:
    values = (STREAMS[name] >> shift) & 0xFF
    counts = np.bincount(values, minlength=256)
    assert chi_square_probability(counts, np.full(256, NUM_DRAWS / 256)) > SUSPICIOUS


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighbours_are_independent(name: str, lag: int) -> None:
    cells = (uniforms(STREAMS[name]) * 16).astype(np.int64)
    counts = np.bincount(cells[:-lag] * 16 + cells[lag:], minlength=256)
    assert chi_square_probability(counts, np.full(256, (NUM_DRAWS - lag) / 256)) > SUSPICIOUS


def test_neighbours_of_all_three_kinds_share_no_bit() -> None:
    """Each bit of the difference between neighbours is as often 1 as 0."""
    grid = np.meshgrid(*(np.arange(60),) * 3, indexing="ij")
    bits = bits_of(*grid).reshape(60, 60, 60)
    for axis in range(3):
        differences = np.bitwise_xor(bits.take(range(1, 60), axis), bits.take(range(59), axis))
        share = np.unpackbits(differences.view(np.uint8).reshape(-1, 8), axis=1).mean(0)
        assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(differences.size)


@given(st.one_of(st.just(0), st.just(-1), int64))
def test_noise_is_finite_whatever_the_bits(bits: int) -> None:
    stream = undrawn(bits)
    assert draw(stream, np.zeros(1, np.int64)).tolist() == [bits]
    assert np.isfinite(gumbel(stream, np.zeros(1, np.int64))).all()


def undrawn(bits: int) -> NDArray[np.int64]:
    """The stream whose first number has these bits: SplitMix64 backwards."""
    mask = 2**64 - 1
    state = bits & mask
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        wide = state
        for _ in range(3):
            wide = state ^ (wide >> shift)
        state = wide * pow(factor, -1, 2**64) & mask
    return np.array([(state - 0x9E3779B97F4A7C15) & mask], np.uint64).view(np.int64)


@pytest.mark.parametrize("along", ["positions of a seed", "seeds at a position"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_largest_of_logits_and_noise_is_a_sample(along: str, temperature: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=64) * 2 / temperature
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    numbers, same = np.arange(100_000), np.full(100_000, 7)
    pair = (same, numbers) if along == "positions of a seed" else (numbers, same)
    noise = gumbel(position_streams(*pair)[:, None], np.arange(64)[None])
    counts = np.bincount((logits + noise).argmax(-1), minlength=64)
    assert chi_square_probability(counts, probabilities * 100_000) > SUSPICIOUS


sequences = st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=4)


@given(sequences, sequences, st.lists(st.integers(0, 3), min_size=1, max_size=8), int64)
def test_drafts_with_a_seed_are_what_the_noise_makes_of_the_votes(
    older: list[list[int]], newer: list[list[int]], context: list[int], seed: int
) -> None:
    history = History()
    for generation, texts in enumerate((older, newer)):
        for text in texts:
            history.add("p", generation, text)
    reader = history.reader(max_match=4, decay=0.5)
    draft, shares = searched([newer, older], context, seed)
    for unread in {0, max(0, len(context) - 4)}:  # no match is longer
        request = reader.open("p", seed, unread)
        reader.propose([request], [context[unread : unread + 3]], 0)
        found = reader.propose([request], [context[unread + 3 :]], 5)
        assert found.of(0) == draft
        assert found.probabilities[0, : len(draft)] == pytest.approx(shares)


def searched(
    generations: list[list[list[int]]], context: list[int], seed: int
) -> tuple[list[int], list[float]]:
    """The draft and the winners' shares of the votes, found by reading all of the text."""
    size = max(
        (
            size
            for size in range(1, min(4, len(context)) + 1)
            if any(followers(texts, context[-size:]) for texts in generations)
        ),
        default=0,
    )
    text = context[-size:]
    voters = [(texts, 0.5**age) for age, texts in enumerate(generations)] if size else []
    voters = [(texts, weight) for texts, weight in voters if followers(texts, text)]
    draft: list[int] = []
    shares: list[float] = []
    while len(draft) < 5:
        votes = [sum(w * count(texts, [*text, token]) for texts, w in voters) for token in range(4)]
        if not any(votes):
            break
        streams = position_streams(np.array([seed]), np.array([len(context) + len(draft)]))
        with np.errstate(divide="ignore"):
            scores = np.log(votes) + gumbel(streams, np.arange(4))
        token = int(scores.argmax())
        draft.append(token)
        shares.append(votes[token] / sum(w * count(texts, text) for texts, w in voters))
        text = [*text, token]
        voters = [(texts, weight) for texts, weight in voters if count(texts, text)]
    return draft, shares


def followers(texts: list[list[int]], text: list[int]) -> bool:
    return any(count(texts, [*text, token]) for token in range(4))


def test_without_a_seed_a_draft_knows_no_noise() -> None:
    history = History()
    history.add("p", 0, [1, 2, 1, 2, 1, 3])
    reader = history.reader()
    drafts = {tuple(reader.propose([reader.open("p")], [[1]], 1).of(0)) for _ in range(50)}
    assert drafts == {(2,)}
    seeded = {tuple(reader.propose([reader.open("p", s)], [[1]], 1).of(0)) for s in range(50)}
    assert seeded == {(2,), (3,)}


def test_guesses_with_the_same_noise_are_right_as_often_as_the_paper_says() -> None:
    generator = np.random.default_rng(1)
    num_guesses, tokens = 20_000, np.arange(30)
    noise = gumbel(
        position_streams(np.full(num_guesses, 3), np.arange(num_guesses))[:, None], tokens
    )
    for concentration in (0.05, 0.3, 3.0):
        truth, guess = generator.dirichlet(np.full(30, concentration), size=2)
        guess = 0.7 * truth + 0.3 * guess
        choices = [(np.log(p) + noise).argmax(-1) for p in (truth, guess)]
        distance = np.abs(truth - guess).sum() / 2
        share = (choices[0] == choices[1]).mean()
        assert share >= (1 - distance) / (1 + distance) - 5 * 0.5 / np.sqrt(num_guesses)
        assert share > truth[guess.argmax()], "the likeliest token is a better guess"


def test_drafts_that_know_the_noise_are_accepted_more_often() -> None:
    generator = np.random.default_rng(0)
    log_probabilities = np.log(generator.dirichlet(np.full(40, 0.05), size=40) + 1e-12)

    def sample(seed: int) -> list[int]:
        noise = gumbel(position_streams(np.full(150, seed), np.arange(150))[:, None], np.arange(40))
        text = [0]
        for position in range(1, 150):
            text.append(int((log_probabilities[text[-1]] + noise[position]).argmax()))
        return text

    history = History()
    for seed in range(16):
        history.add("p", 0, sample(seed))
    texts = {seed: sample(seed) for seed in range(16, 32)}
    unaware, aware, misled = (
        sum(accepted_a_round(history, text, known(seed)) for seed, text in texts.items())
        for known in (lambda seed: None, lambda seed: seed, lambda seed: seed + 1)
    )
    assert aware > 1.2 * unaware > 1.2 * misled


def accepted_a_round(history: History, text: list[int], seed: int | None) -> float:
    """Drafted tokens that are those of the text, each round being drafted for anew."""
    reader = history.reader()
    request = reader.open("p", seed)
    read, end, num_rounds = 0, 1, 0
    while end < len(text):
        draft = reader.propose([request], [text[read:end]], 8).of(0)
        right = [drafted == token for drafted, token in zip(draft, text[end:], strict=False)]
        read, num_rounds = end, num_rounds + 1
        end += (right.index(False) if False in right else len(right)) + 1
    return (len(text) - 1 - num_rounds) / num_rounds
