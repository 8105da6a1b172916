"""The books balance after any story; an event that cannot be is refused and changes nothing."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from paceline.controller.ledger.events import Event, Kind, LedgerError
from paceline.controller.ledger.state import LedgerState, Status, fold
from tests.controller.ledger.stories import possible, stories

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


class Books(RuleBasedStateMachine):
    """Events that may follow, and others that are refused; every law after each of them."""

    def __init__(self):
        super().__init__()
        self.state = LedgerState()

    @rule(data=st.data())
    def something_happens(self, data):
        self.state.apply(data.draw(st.sampled_from(list(possible(self.state)))))

    @rule(kind=st.sampled_from(list(Kind)), key=st.integers(-1, 30))
    def an_event_that_cannot_follow_is_refused(self, kind, key):
        if kind is Kind.SNAPSHOT or (kind is Kind.ADMITTED and key > self.state.last):
            return
        if any((event.kind, event.key) == (kind, key) for event in possible(self.state)):
            return
        details = {
            Kind.ADMITTED: {"prompt": "p"},
            Kind.FINISHED: {"oldest": 0, "newest": 0},
            Kind.BATCHED: {"trained": [key, key + 1], "held": [], "dropped": {}},
            Kind.SET_ASIDE: {"reason": "r"},
        }
        before = self.state.as_dict()
        with pytest.raises(LedgerError):
            self.state.apply(Event(kind, key, 1.0, details.get(kind, {})))
        assert self.state.as_dict() == before

    @rule(
        kind=st.sampled_from(list(Kind)),
        key=st.integers(-1, 30),
        detail=st.one_of(NONSENSE, BATCHES),
    )
    def a_damaged_event_is_refused_or_leaves_a_state_that_adds_up(self, kind, key, detail):
        found = copy.deepcopy(self.state)
        try:
            found.apply(Event(kind, key, 1.0, detail))
        except LedgerError:
            assert found == self.state
        else:
            assert found.balance().missing == 0
            assert sorted(batched(found)) == found.with_status(Status.BATCHED, Status.TRAINED)

    @invariant()
    def what_was_admitted_is_trained_dropped_or_pending(self):
        balance = self.state.balance()
        assert balance.missing == 0
        assert balance.admitted == self.state.admitted

    @invariant()
    def a_group_is_trained_by_one_step_at_a_time(self):
        assert sorted(batched(self.state)) == self.state.with_status(Status.BATCHED, Status.TRAINED)

    @invariant()
    def every_group_that_is_trained_or_will_be_has_an_age(self):
        balance = self.state.balance()
        assert self.state.ages.total() == balance.trained + balance.pending["batched"]
        assert min(self.state.ages.values(), default=0) >= 0

    @invariant()
    def samples_that_are_gone_belong_to_groups_that_none_will_ask_for(self):
        assert not set(self.state.gone) & self.state.live.keys()


def batched(state):
    """Groups of all batches, as often as they are in one."""
    return [group for batch in state.batches.values() for group in batch.trained]


TestBooks = Books.TestCase
TestBooks.settings = settings(stateful_step_count=30)


@given(stories())
def test_a_snapshot_is_the_whole_state(story):
    state = fold(story[0])
    restored = LedgerState.from_dict(json.loads(json.dumps(state.as_dict())))
    assert restored.as_dict() == state.as_dict()
    event = Event(Kind.SNAPSHOT, state.step, 1.0, json.loads(json.dumps(state.as_dict())))
    assert fold([event]).as_dict() == state.as_dict()


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
