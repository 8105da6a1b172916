"""The books balance after any story; an event that cannot be is refused and changes nothing."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.controller.ledger.events import Event, Kind, LedgerError
from paceline.controller.ledger.state import LedgerState, Status, fold
from tests.controller.ledger.stories import possible, stories

MANY = settings(max_examples=150, deadline=None)


@MANY
@given(stories())
def test_what_was_admitted_is_trained_dropped_or_pending(story):
    for state in story[1]:
        balance = state.balance()
        assert balance.missing == 0
        assert balance.admitted == state.admitted


@MANY
@given(stories())
def test_a_group_is_trained_by_one_step_at_a_time(story):
    for state in story[1]:
        batched = [group for batch in state.batches.values() for group in batch.trained]
        assert len(batched) == len(set(batched))
        assert set(batched) == set(state.with_status(Status.BATCHED, Status.TRAINED))


@MANY
@given(stories(), st.sampled_from(list(Kind)), st.integers(-1, 30))
def test_an_event_that_cannot_follow_is_refused_and_changes_nothing(story, kind, key):
    state = fold(story[0])
    if kind is Kind.SNAPSHOT or any((e.kind, e.key) == (kind, key) for e in possible(state)):
        return
    details = {
        Kind.ADMITTED: {"prompt": "p"},
        Kind.FINISHED: {"oldest": 0, "newest": 0},
        Kind.BATCHED: {"trained": [key, key + 1], "held": [], "dropped": {}},
        Kind.SET_ASIDE: {"reason": "r"},
    }
    event = Event(kind, key, 1.0, details.get(kind, {}))
    before = state.as_dict()
    if kind is Kind.ADMITTED and key > state.last:
        return
    with pytest.raises(LedgerError):
        state.apply(event)
    assert state.as_dict() == before


IDS = st.lists(st.integers(0, 12), max_size=4)
WORDS = ("trained", "held", "dropped", "oldest", "newest", "reason", "live", "batches", "step", "3")
NONSENSE = st.dictionaries(
    st.sampled_from(WORDS),
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 30) | st.text(max_size=3),
        lambda values: (
            st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(WORDS), values)
        ),
        max_leaves=6,
    ),
)
DROPPED = st.dictionaries(st.integers(0, 12).map(str), st.just("reason"), max_size=3)
BATCHES = st.fixed_dictionaries({"trained": IDS, "held": IDS, "dropped": DROPPED})


@settings(max_examples=400, deadline=None)
@given(stories(), st.sampled_from(list(Kind)), st.integers(-1, 30), NONSENSE | BATCHES)
def test_a_damaged_event_is_refused_and_changes_nothing_or_leaves_a_state_that_adds_up(
    story, kind, key, detail
):
    state = fold(story[0])
    before = copy.deepcopy(state)
    try:
        state.apply(Event(kind, key, 1.0, detail))
    except LedgerError:
        assert state == before
    else:
        assert state.balance().missing == 0
        batched = [group for batch in state.batches.values() for group in batch.trained]
        assert sorted(batched) == state.with_status(Status.BATCHED, Status.TRAINED)


@MANY
@given(stories())
def test_every_group_that_is_trained_or_will_be_has_an_age(story):
    for state in story[1]:
        pending = state.balance().pending
        assert state.ages.total() == state.balance().trained + pending["batched"]
        assert min(state.ages.values(), default=0) >= 0


@MANY
@given(stories())
def test_a_snapshot_is_the_whole_state(story):
    state = fold(story[0])
    restored = LedgerState.from_dict(json.loads(json.dumps(state.as_dict())))
    assert restored.as_dict() == state.as_dict()
    event = Event(Kind.SNAPSHOT, state.step, 1.0, json.loads(json.dumps(state.as_dict())))
    assert fold([event]).as_dict() == state.as_dict()


@MANY
@given(stories())
def test_samples_that_are_gone_belong_to_groups_nobody_will_ask_for(story):
    state = LedgerState()
    for event in story[0]:
        state.apply(event)
        assert not state.gone or not set(state.gone) & state.live.keys()


def events(*pairs):
    details = {
        Kind.ADMITTED: {"prompt": "p"},
        Kind.FINISHED: {"oldest": 0, "newest": 0},
    }
    return [Event(kind, key, 0.0, details.get(kind, {})) for kind, key in pairs]


def trained_steps(count):
    found = []
    for i in range(count):
        found += events((Kind.ADMITTED, i), (Kind.CLAIMED, i), (Kind.FINISHED, i))
        found.append(Event(Kind.BATCHED, i, 0.0, {"trained": [i], "held": [], "dropped": {}}))
        found.append(Event(Kind.TRAINED, i, 0.0, {"checksum": i}))
    return found


def test_resuming_makes_later_steps_undone_and_their_batches_stay():
    state = fold([*trained_steps(4), Event(Kind.RESUMED, 2, 0.0)])
    assert [batch.step for batch in state.untrained_batches()] == [2, 3]
    assert state.with_status(Status.BATCHED) == [2, 3]
    assert state.balance().trained == 2


def test_a_step_done_again_with_other_weights_is_noticed():
    again = [Event(Kind.RESUMED, 2, 0.0), Event(Kind.TRAINED, 2, 0.0, {"checksum": 2})]
    state = fold([*trained_steps(4), *again])
    assert state.diverged == []
    state.apply(Event(Kind.TRAINED, 3, 0.0, {"checksum": 999}))
    assert state.diverged == [3]


def test_a_snapshot_that_does_not_add_up_is_refused():
    state = fold(trained_steps(3))
    for field, wrong in [("admitted", 4), ("trained", 1), ("batches", []), ("live", {})]:
        damaged = json.loads(json.dumps(state.as_dict())) | {field: wrong}
        with pytest.raises(LedgerError, match="does not add up"):
            fold([Event(Kind.SNAPSHOT, 3, 0.0, damaged)])


def test_settled_training_cannot_be_taken_back():
    state = fold([*trained_steps(4), Event(Kind.SETTLED, 3, 0.0)])
    with pytest.raises(LedgerError, match="steps 3 to 4"):
        state.apply(Event(Kind.RESUMED, 2, 0.0))
    assert state.balance().trained == 4
    assert list(state.live) == [3]
