"""The switch, and the rounding of budgets to whole drafts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.spec.rounding import DraftRounding, within_batch
from paceline.spec.switch import LONGEST_INTERVAL, DraftSwitch


def test_what_does_not_pay_is_drafted_ever_more_rarely() -> None:
    switch = DraftSwitch()
    decisions = [switch.decide(0.8) for _ in range(5000)]
    assert all(decision.probe for decision in decisions if decision.draft)
    probes = np.flatnonzero([decision.draft for decision in decisions])
    assert probes[0] < 16
    assert (np.diff(probes)[-5:] == LONGEST_INTERVAL).all()
    assert len(probes) < 25


def test_what_pays_is_drafted_but_for_probes_of_what_plain_steps_cost() -> None:
    switch = DraftSwitch()
    decisions = [switch.decide(1.5) for _ in range(5000)]
    plain = [decision for decision in decisions if not decision.draft]
    assert 0 < len(plain) < 25 and all(decision.probe for decision in plain)


def test_noise_around_the_margin_does_not_toggle_it() -> None:
    switch = DraftSwitch(margin=0.02, hysteresis=0.02)
    states = []
    for gain in [1.03] * 20 + [1.05] + [1.03] * 20 + [1.01] + [1.03] * 20:
        switch.decide(gain)
        states.append(switch.is_on)
    assert states == [False] * 20 + [True] * 21 + [False] * 21


def test_a_change_of_mind_is_soon_probed() -> None:
    switch = DraftSwitch()
    for _ in range(3000):
        switch.decide(1.5)
    decisions = [switch.decide(0.5) for _ in range(20)]
    assert not decisions[0].draft and any(decision.draft for decision in decisions)


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 8), min_size=1, max_size=6),
    st.integers(1, 60),
)
def test_whole_drafts_add_up_to_the_budget(per_round: list[float], num_rounds: int) -> None:
    rounding = DraftRounding(max_draft=8)
    requests = list(range(len(per_round)))
    drafts = np.array([rounding.round(requests, np.array(per_round)) for _ in range(num_rounds)])
    assert (np.abs(drafts.sum(0) - num_rounds * np.array(per_round)) < 1 + 1e-6).all()
    assert (np.abs(drafts - np.array(per_round)) < 1 + 1e-6).all()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 8), st.integers(0, 10)),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 20),
)
def test_no_round_drafts_more_than_is_offered_allowed_or_has_room(
    requests: list[tuple[float, int]], batch_limit: int
) -> None:
    rounding = DraftRounding(max_draft=8)
    per_round, offered = (np.array(column) for column in zip(*requests, strict=True))
    for _ in range(10):
        drafts = rounding.round(range(len(requests)), per_round, offered, batch_limit)
        assert (drafts >= 0).all() and (drafts <= np.minimum(offered, 8)).all()
        assert drafts.sum() <= batch_limit


def test_what_the_drafter_lacked_in_one_round_is_spent_where_it_has_more() -> None:
    rounding = DraftRounding(max_draft=8)
    total = 0
    for i in range(100):
        offered = np.array([8 if i % 2 else 0])
        total += int(rounding.round(["a"], np.array([2.0]), offered)[0])
    assert total == pytest.approx(200, abs=3)


def test_cutting_shortens_the_longest_drafts_first() -> None:
    assert within_batch(np.array([5, 1, 3]), 6).tolist() == [3, 1, 2]
    assert within_batch(np.array([5, 1, 3]), 9).tolist() == [5, 1, 3]
    assert within_batch(np.array([5, 1, 3]), 0).tolist() == [0, 0, 0]
