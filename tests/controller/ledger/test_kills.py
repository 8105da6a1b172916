"""kill -9 of whoever writes the ledger, and of the Redis that keeps it: nothing acknowledged is
lost, nothing is written twice."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from paceline.controller.ledger.events import Event, Kind, LedgerError
from paceline.controller.ledger.redis_streams import RedisStore
from paceline.controller.ledger.sqlite import SQLiteStore
from paceline.controller.ledger.state import Status, fold
from tests.controller.builders import make_prompt
from tests.controller.ledger.appender import life_of

ROOT = Path(__file__).resolve().parents[3]


def append_until_killed(kind: str, where: str, first: int) -> list[int]:
    """Group ids that a process got acknowledged before it was killed in the middle of its work."""
    arguments = [sys.executable, "-m", "tests.controller.ledger.appender", kind, where, str(first)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(20)]
    time.sleep(0.05)
    process.kill()
    lines += process.stdout.readlines()
    process.wait()
    return [int(line) for line in lines if line.endswith("\n")]


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_a_killed_writer_loses_nothing_that_was_acknowledged(kind, tmp_path, request):
    if kind == "sqlite":
        where = str(tmp_path / "ledger.sqlite")
    else:
        where = request.getfixturevalue("own_redis")().url
    acknowledged: list[int] = []
    for _ in range(3):
        first = max(acknowledged, default=-1) + 2  # one more may have been written unseen
        acknowledged += append_until_killed(kind, where, first)
        store = SQLiteStore(Path(where)) if kind == "sqlite" else RedisStore(where, "run")
        state = fold(store.history())
        finished = state.with_status(Status.FINISHED)
        assert set(acknowledged) <= set(finished)
        assert len(finished) <= len(acknowledged) + 3
        assert store.group_ids() == set(finished) == set(state.live), "an append was cut in two"
        for group_id in finished[-3:]:
            assert store.group(group_id, make_prompt(group_id)).group_id == group_id
        store.close()
    assert len(acknowledged) >= 60


def test_a_redis_that_is_killed_and_restarted_has_all_it_acknowledged(own_redis):
    server = own_redis()
    store = RedisStore(server.url, "run", reconnect_seconds=20)
    stop, acknowledged, failures = threading.Event(), [], []

    def write():
        group_id = 0
        try:
            while not stop.is_set():
                store.append(life_of(group_id))
                acknowledged.append(group_id)
                group_id += 1
        except LedgerError as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(4):
        enough = len(acknowledged) + 20
        while len(acknowledged) < enough and writer.is_alive():
            time.sleep(0.005)
        server.kill()
        server.start()
    enough = len(acknowledged) + 20
    while len(acknowledged) < enough and writer.is_alive():
        time.sleep(0.005)
    stop.set()
    writer.join()
    assert not failures
    again = RedisStore(server.url, "run")
    assert fold(again.history()).with_status(Status.FINISHED) == acknowledged
    assert again.group_ids() == set(acknowledged)


@pytest.mark.parametrize("step", ["stream", "_commit"])
def test_an_append_whose_reply_was_lost_is_not_written_twice(shared_redis, step):
    name = f"lost-reply-{step}"
    store = RedisStore(shared_redis.url, name, reconnect_seconds=5)
    sender = store if hasattr(store, step) else store._server
    done, calls = getattr(sender, step), []

    def done_but_unheard(*arguments):
        answer = done(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            raise redis.ConnectionError("connection reset by peer")
        return answer

    setattr(sender, step, done_but_unheard)
    store.append(life_of(0))
    store.append(life_of(1))
    assert len(calls) == 3
    again = RedisStore(shared_redis.url, name)
    assert fold(again.history()).with_status(Status.FINISHED) == [0, 1]
    assert shared_redis.client().xlen(f"paceline:{name}:finished") == 2


def test_samples_of_an_append_that_was_cut_in_two_do_not_stay(shared_redis):
    client, key = shared_redis.client(), "paceline:cut:finished"
    store = RedisStore(shared_redis.url, "cut")
    store.append(life_of(0))
    store._commit = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # killed before it counts
    with pytest.raises(KeyboardInterrupt):
        store.append(life_of(1))
    assert client.xlen(key) == 2
    heir = RedisStore(shared_redis.url, "cut")
    assert heir.group_ids() == {0}
    assert client.xlen(key) == 2, "its writer might be alive"
    heir.append(life_of(2))
    assert client.xlen(key) == 2
    assert RedisStore(shared_redis.url, "cut").group_ids() == {0, 2}


def test_a_controller_whose_run_was_taken_over_is_stopped_at_its_next_append(shared_redis):
    first = RedisStore(shared_redis.url, "taken", reconnect_seconds=1)
    first.append(life_of(0))
    second = RedisStore(shared_redis.url, "taken", reconnect_seconds=1)
    second.append(life_of(1))
    with pytest.raises(LedgerError, match="another controller writes"):
        first.append(life_of(2))
    assert fold(second.history()).with_status(Status.FINISHED) == [0, 1]


def test_a_controller_whose_run_was_taken_over_trims_nothing(shared_redis):
    first = RedisStore(shared_redis.url, "zombie-snapshot", reconnect_seconds=1)
    first.append(life_of(0))
    second = RedisStore(shared_redis.url, "zombie-snapshot", reconnect_seconds=1)
    second.append(life_of(1))
    with pytest.raises(LedgerError, match="another controller writes"):
        first.append([Event(Kind.SNAPSHOT, 0, 0.0, fold(life_of(0)).as_dict())])
    again = RedisStore(shared_redis.url, "zombie-snapshot")
    assert fold(again.history()).with_status(Status.FINISHED) == [0, 1]


def test_samples_that_two_controllers_write_at_once_are_not_taken_for_each_other(shared_redis):
    """Both are in the middle of an append, samples sent and entry not, and only one can win."""
    name = "zombie-samples"
    RedisStore(shared_redis.url, name).append(life_of(0))
    first, second = (RedisStore(shared_redis.url, name, reconnect_seconds=1) for _ in range(2))
    commit, outcomes = first._commit, []

    def overtaken(*arguments):
        with contextlib.suppress(LedgerError):
            second.append(life_of(2))
            outcomes.append("second")
        return commit(*arguments)

    first._commit = overtaken
    with contextlib.suppress(LedgerError):
        first.append(life_of(1))
        outcomes.append("first")
    winner = {"first": 1, "second": 2}[outcomes[0]]
    again = RedisStore(shared_redis.url, name)
    assert len(outcomes) == 1
    assert again.group_ids() == {0, winner}
    assert again.group(winner, make_prompt(winner)).group_id == winner


def test_a_reader_sees_what_is_written_and_deleted_after_it_opened(shared_redis):
    writer = RedisStore(shared_redis.url, "read")
    writer.append(life_of(0))
    reader = RedisStore(shared_redis.url, "read", reconnect_seconds=0, read_only=True)
    writer.append(life_of(1) + life_of(2))
    writer.forget([0])
    assert set(fold(reader.history(whole=True)).live) == {0, 1, 2}
    assert reader.group_ids() == {1, 2}
    assert reader.group(2, make_prompt(2)).group_id == 2
    groups = shared_redis.client().xinfo_consumers("paceline:read:finished", "learner")
    assert not groups, "a reader takes nothing over"


def test_samples_of_a_dead_controller_are_claimed_from_its_consumer(shared_redis):
    """Delivered once to a controller that died while recovering, then to the next."""
    RedisStore(shared_redis.url, "claimed").append(life_of(0) + life_of(1))
    dead = RedisStore(shared_redis.url, "claimed")
    assert dead.group(0, make_prompt(0)).group_id == 0
    key, client = "paceline:claimed:finished", shared_redis.client()
    assert client.xpending(key, "learner")["pending"] == 2
    heir = RedisStore(shared_redis.url, "claimed")
    for group_id in (0, 1):
        assert heir.group(group_id, make_prompt(group_id)).group_id == group_id
    assert [each["name"] for each in client.xpending(key, "learner")["consumers"]] == [
        heir._consumer.encode()
    ]
    heir.forget([0, 1])
    assert client.xpending(key, "learner")["pending"] == client.xlen(key) == 0


def test_a_snapshot_keeps_the_journal_in_redis_short(shared_redis):
    store = RedisStore(shared_redis.url, "short")
    for group_id in range(50):
        store.append(life_of(group_id))
    snapshot = Event(Kind.SNAPSHOT, 0, 0.0, fold(store.history()).as_dict())
    store.append([snapshot])
    assert shared_redis.client().xlen("paceline:short:journal") == 1
    again = RedisStore(shared_redis.url, "short")
    assert again.group_ids() == set(range(50))
