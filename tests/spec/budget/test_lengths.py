"""Remaining lengths against direct counting, with what was cut off counted as cut off."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.spec.budget.lengths import EDGES, LengthHistory

LIMIT = 10**6
lengths_seen = st.lists(st.tuples(st.integers(1, 15), st.booleans()), min_size=1, max_size=30)


def history_of(lengths: list[tuple[int, bool]]) -> LengthHistory:
    history = LengthHistory()
    for length, finished in lengths:
        history.add("key", length, finished)
    return history


def kaplan_meier(lengths: list[tuple[int, bool]], time: int) -> float:
    survival = 1.0
    for t in range(1, time + 1):
        reached = sum(length >= t for length, _ in lengths)
        ended = sum(length == t and finished for length, finished in lengths)
        survival *= 1 - ended / reached if reached else 1.0
    return survival


@given(lengths_seen)
def test_survival_is_kaplan_and_meiers(lengths: list[tuple[int, bool]]) -> None:
    pooled, by_key = history_of(lengths).pooled(), history_of(lengths).survival("key")
    for time in range(max(length for length, _ in lengths) + 1):
        assert pooled.at(time) == pytest.approx(kaplan_meier(lengths, time))
        assert by_key.at(time) == pytest.approx(pooled.at(time))  # one key is the pool


@given(st.lists(st.integers(1, 15), min_size=1, max_size=30), st.data())
def test_what_remains_is_the_mean_over_the_longer_ones(
    lengths: list[int], data: st.DataObject
) -> None:
    history = history_of([(length, True) for length in lengths])
    so_far = data.draw(st.integers(0, max(lengths) - 1))
    limit = data.draw(st.integers(so_far + 1, 40))
    longer = [min(length, limit) - so_far for length in lengths if length > so_far]
    expected = max(1.0, float(np.mean(longer)))
    assert history.expected_remaining("key", so_far, limit) == pytest.approx(expected)


@given(st.integers(0, 100), st.integers(0, 3000))
def test_what_remains_of_a_long_tail_is_right_to_the_width_of_a_bin(seed: int, so_far: int) -> None:
    lengths = np.ceil(np.random.default_rng(seed).lognormal(6, 1, 3000)).astype(int)
    history = history_of([(int(length), True) for length in lengths])
    longer = lengths[lengths > so_far]
    remaining = history.expected_remaining("key", so_far, LIMIT)
    assert remaining == pytest.approx((longer - so_far).mean(), rel=0.1, abs=0.05 * so_far)


@given(lengths_seen, st.integers(0, 60), st.integers(1, 50))
def test_what_remains_is_at_least_a_token_and_at_most_what_is_allowed(
    lengths: list[tuple[int, bool]], so_far: int, left: int
) -> None:
    history = history_of(lengths)
    for key in ("key", "unknown"):
        assert 1 <= history.expected_remaining(key, so_far, so_far + left) <= left


def test_cut_off_lengths_are_not_taken_for_ends() -> None:
    lengths = np.ceil(np.random.default_rng(0).exponential(400, 4000)).astype(int)
    cut = 300
    history = history_of([(int(min(length, cut)), bool(length <= cut)) for length in lengths])
    assert history.pooled().at(cut) == pytest.approx((lengths > cut).mean(), abs=0.01)
    assert history.expected_remaining("key", 100, cut) == pytest.approx(
        np.minimum(lengths[lengths > 100], cut).mean() - 100, rel=0.05
    )


def test_requests_still_running_keep_a_batch_from_looking_short() -> None:
    lengths = np.ceil(np.random.default_rng(1).lognormal(5, 1, 256)).astype(int)
    now = int(np.median(lengths))
    history = history_of([(int(length), True) for length in lengths if length <= now])
    assert history.expected_remaining("key", now // 2, LIMIT) < now / 2
    for _ in range(3):  # set anew each time, not added up
        history.set_running([("key", now)] * int((lengths > now).sum()))
    truth = (np.minimum(lengths[lengths > now // 2], 2 * now) - now // 2).mean()
    remaining = history.expected_remaining("key", now // 2, 2 * now)
    assert remaining == pytest.approx(truth, rel=0.25)
    history.set_running([])
    assert history.expected_remaining("key", now // 2, LIMIT) < now / 2


def test_an_unknown_key_is_the_pool_and_a_known_one_is_itself() -> None:
    history = LengthHistory()
    for key in range(50):
        for _ in range(8):
            history.add(key, 20 if key else 1000, finished=True)
    pooled = history.pooled().expected_remaining(0, LIMIT)
    assert history.expected_remaining("new", 0, LIMIT) == pytest.approx(pooled)
    assert history.expected_remaining(0, 0, LIMIT) > 600
    assert history.expected_remaining(1, 0, LIMIT) < 35


def test_what_outlived_everything_known_is_expected_to_live_as_long_again() -> None:
    history = history_of([(10, True)] * 5)
    assert history.expected_remaining("key", 200, LIMIT) == 200
    assert history.expected_remaining("key", 200, 250) == 50
    assert LengthHistory().expected_remaining("key", 0, 100) == 50


def test_classes_follow_history_first_and_the_length_so_far_later() -> None:
    history = LengthHistory()
    random = np.random.default_rng(0)
    for _ in range(400):
        history.add("many", int(np.ceil(random.lognormal(5, 1))), finished=True)
    for _ in range(8):
        history.add("short", 20, finished=True)
        history.add("long", 3000, finished=True)
    assert history.length_class("short", 0) == "short"
    assert history.length_class("long", 0) == "long"
    classes = [history.length_class("many", so_far) for so_far in (0, 200, 2000)]
    assert classes == ["short", "medium", "long"]


@given(lengths_seen, st.floats(0, 0.999), st.integers(0, 14))
def test_quantiles_rise_and_lie_beyond_the_length_so_far(
    lengths: list[tuple[int, bool]], probability: float, so_far: int
) -> None:
    survival = history_of(lengths).pooled()
    quantile = survival.quantile(probability, so_far)
    assert quantile >= so_far
    assert survival.quantile(min(1.0, probability + 0.1), so_far) >= quantile
    if survival.at(so_far) > 1e-9:
        left = survival.at(quantile) / survival.at(so_far)
        assert left == pytest.approx(1 - probability, abs=1e-6)


def test_ageing_forgets_keys_not_seen_again() -> None:
    history = history_of([(10, True)])
    history.age(0.5)
    assert history.num_keys == 1
    for _ in range(3):
        history.age(0.5)
    assert history.num_keys == 0


def test_bins_hold_one_length_each_at_first_and_a_tenth_of_their_length_later() -> None:
    assert EDGES[:18].tolist() == [*range(18)]
    assert (np.diff(EDGES) > 0).all()
    assert (np.diff(EDGES)[17:] / EDGES[17:-1]).max() < 0.13
