"""Drafting is on where it pays, and tried now and then where it does not."""

from __future__ import annotations

import numpy as np

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
