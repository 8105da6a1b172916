"""What every store promises, and what each does beyond."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.controller.ledger.codec import decode_group
from paceline.controller.ledger.events import Event, Kind, LedgerError
from paceline.controller.ledger.redis_streams import RedisStore
from paceline.controller.ledger.state import fold
from tests.controller.builders import make_group, make_prompt
from tests.controller.ledger.stories import stories

AGAIN = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def without_groups(events):
    """As text makes them: ids in a mapping become strings."""
    state = fold(events)
    return [(e.kind, e.key, e.time) for e in events], state.as_dict()


def finished(group_id):
    return Event(Kind.FINISHED, group_id, 1.0, {"oldest": 0, "newest": 0}, make_group(group_id))


@AGAIN
@given(story=stories(), cuts=st.lists(st.integers(0, 60)))
def test_what_was_appended_is_read_back_in_order_after_any_reopening(fresh_store, story, cuts):
    opener, events = fresh_store(), story[0]
    bounds = sorted({0, len(events), *(cut for cut in cuts if cut < len(events))})
    for start, end in itertools.pairwise(bounds):
        opener().append(events[start:end])
    store = opener()
    assert without_groups(list(store.history())) == without_groups(events)
    expected = {event.key for event in events if event.group is not None}
    assert store.group_ids() == expected
    for group_id in expected:
        group = store.group(group_id, make_prompt(group_id))
        assert group.group_id == group_id
        assert group.samples[0].completion.token_ids.tolist() == (
            make_group(group_id).samples[0].completion.token_ids.tolist()
        )


def test_history_begins_at_the_last_snapshot(fresh_store):
    opener = fresh_store()
    first = [Event(Kind.ADMITTED, i, 1.0, {"prompt": f"p{i}"}) for i in range(5)]
    snapshot = Event(Kind.SNAPSHOT, 0, 2.0, fold(first).as_dict())
    last = Event(Kind.ADMITTED, 7, 3.0, {"prompt": "p7"})
    opener().append(first)
    opener().append([snapshot])
    opener().append([last])
    assert [event.kind for event in opener().history()] == [Kind.SNAPSHOT, Kind.ADMITTED]
    assert fold(opener().history()).as_dict() == fold([*first, last]).as_dict()


def test_a_snapshot_in_the_middle_of_an_append_is_where_history_begins(fresh_store):
    opener = fresh_store()
    before = Event(Kind.ADMITTED, 3, 1.0, {"prompt": "p3"})
    snapshot = Event(Kind.SNAPSHOT, 0, 2.0, fold([before]).as_dict())
    after = Event(Kind.CLAIMED, 3, 3.0)
    opener().append([before])
    opener().append([Event(Kind.CLAIMED, 3, 1.5), Event(Kind.RETURNED, 3, 1.6), snapshot, after])
    assert [event.kind for event in opener().history()] == [Kind.SNAPSHOT, Kind.CLAIMED]


def test_samples_outlive_the_snapshot_after_them(fresh_store):
    opener = fresh_store()
    opener().append([finished(3)])
    opener().append([Event(Kind.SNAPSHOT, 0, 2.0, fold([]).as_dict())])
    assert opener().group(3, make_prompt(3)).group_id == 3


def test_forgotten_samples_are_gone_and_asking_for_them_is_an_error(fresh_store):
    opener = fresh_store()
    store = opener()
    store.append([finished(1), finished(2)])
    store.forget([1, 99])
    assert store.group_ids() == {2}
    store = opener()
    assert store.group_ids() == {2}
    with pytest.raises(LedgerError, match="group 1"):
        store.group(1, make_prompt(1))


def test_finished_groups_can_be_read_by_others_in_a_consumer_group_of_their_own(shared_redis):
    client, key = shared_redis.client(), "paceline:read-by-others:finished"
    store = RedisStore(shared_redis.url, "read-by-others")
    store.append([finished(1), finished(2)])
    client.xgroup_create(key, "drafters", id="0")
    [[_, entries]] = client.xreadgroup("drafters", "me", {key: ">"})
    for group_id, (_, fields) in zip((1, 2), entries, strict=True):
        assert int(fields[b"group"]) == group_id
        again = decode_group(fields[b"content"], make_prompt(group_id), group_id)
        assert again.samples[0].text == make_group(group_id).samples[0].text
    store.forget([1])
    assert store.group_ids() == {2}


def test_samples_of_another_prompt_are_refused(fresh_store):
    store = fresh_store()()
    store.append([finished(1)])
    with pytest.raises(LedgerError, match="p2"):
        store.group(1, make_prompt(2))
