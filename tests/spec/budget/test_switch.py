"""Drafting is on where it pays, and tried now and then where it does not."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.spec.budget.switch import (
    FIRST_CREDIT,
    INTERVAL_AFTER_UPDATE,
    LONGEST_INTERVAL,
    PROPOSAL_SHARE,
    DraftSwitch,
    ProposalBudget,
)


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


def test_new_weights_are_probed_soon() -> None:
    switch = DraftSwitch()
    for _ in range(3000):
        switch.decide(0.8)
    switch.weights_changed()
    assert any(switch.decide(0.8).draft for _ in range(INTERVAL_AFTER_UPDATE))


@given(st.floats(1e-4, 0.1), st.floats(1e-5, 0.1))
def test_looking_costs_its_share_of_the_time_and_no_more(step: float, look: float) -> None:
    proposals = ProposalBudget()
    num_rounds, spent = 2000, 0.0
    for _ in range(num_rounds):
        cost = look if proposals.are_due else 0.0
        spent += cost
        proposals.spend(step, cost)
    assert spent <= PROPOSAL_SHARE * num_rounds * step + FIRST_CREDIT + look + 1e-9
    assert spent > 0


def test_what_costs_next_to_nothing_is_looked_at_always() -> None:
    proposals = ProposalBudget()
    for _ in range(100):
        assert proposals.are_due
        proposals.spend(0.1, 1e-5)
