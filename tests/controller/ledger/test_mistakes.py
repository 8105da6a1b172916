"""Bad input to the ledger: one line that says what to do, and nothing is overwritten."""

from __future__ import annotations

import sqlite3
import stat
import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from paceline.configs.errors import ConfigError
from paceline.configs.schema.store import RedisStoreConfig, StoreConfig
from paceline.controller.ledger.events import SCHEMA, LedgerError
from paceline.controller.ledger.opening import open_store
from paceline.controller.ledger.redis_streams import RedisStore
from paceline.controller.ledger.sqlite import SQLiteStore
from paceline.controller.ledger.state import fold
from tests.controller.ledger.appender import life_of


@pytest.fixture
def path(tmp_path):
    """A ledger with two groups."""
    path = tmp_path / "ledger.sqlite"
    store = SQLiteStore(path)
    store.append(life_of(0) + life_of(1))
    store.close()
    return path


def refused(match, call, *arguments, **keywords):
    with pytest.raises(LedgerError, match=match) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path, statement):
    database = sqlite3.connect(path)
    with database:
        database.execute(statement)
    database.close()


def read(path):
    store = SQLiteStore(path)
    try:
        return fold(store.history())
    finally:
        store.close()


@pytest.mark.parametrize(("schema", "writer"), [(SCHEMA + 1, "newer"), (SCHEMA - 1, "older")])
def test_a_file_of_another_schema_is_refused_and_left_as_it_is(path, schema, writer):
    change(path, f"PRAGMA user_version = {schema}")
    before = path.read_bytes()
    refused(f"has schema {schema}.*{writer} version", SQLiteStore, path)
    assert path.read_bytes() == before


def test_something_else_in_place_of_the_ledger_is_left_as_it_is(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_text("my diary " * 1000)
    refused("cannot be used .*not a database", SQLiteStore, path)
    assert path.read_text() == "my diary " * 1000


def test_another_database_in_place_of_the_ledger_is_left_as_it_is(tmp_path):
    path = tmp_path / "ledger.sqlite"
    change(path, "CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()
    refused("is a database, but no ledger", SQLiteStore, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE journal SET detail = '{' WHERE sequence = 2",
        "UPDATE journal SET kind = 'teleported' WHERE sequence = 2",
        "UPDATE journal SET detail = NULL WHERE sequence = 2",
        "DELETE FROM journal WHERE sequence = 2",
    ],
)
def test_a_damaged_row_is_named(path, damage):
    change(path, damage)
    refused("row 2 of the ledger .* is damaged", read, path)


def test_a_doubled_event_is_noticed(path):
    change(path, "UPDATE journal SET key = 0 WHERE sequence = 4")
    refused("admits group 0 after group 0", read, path)


def test_a_ledger_in_use_is_not_opened_a_second_time(path):
    store = SQLiteStore(path)
    refused("in use: this run is going on in another process", SQLiteStore, path)
    store.close()
    SQLiteStore(path).close()


def test_a_ledger_can_be_read_while_it_is_written(path):
    store = SQLiteStore(path)
    reader = SQLiteStore(path, read_only=True)
    store.append(life_of(2))
    assert set(fold(reader.history(whole=True)).live) == {0, 1, 2}
    with pytest.raises(LedgerError, match="readonly"):
        reader.append(life_of(3))
    reader.close()
    store.close()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    refused("No such file or directory", SQLiteStore, tmp_path / "gone" / "ledger.sqlite")


def test_a_folder_that_cannot_be_written_is_named():
    refused("cannot be written", SQLiteStore, Path("/sys/ledger.sqlite"))


def test_a_full_disk_loses_nothing_and_once_there_is_room_the_run_goes_on(path):
    store = SQLiteStore(path)
    pages = store._database.execute("PRAGMA page_count").fetchone()[0]
    store._database.execute(f"PRAGMA max_page_count = {pages + 2}")
    for group_id in range(2, 1000):
        try:
            store.append(life_of(group_id))
        except LedgerError as error:
            assert "disk is full" in str(error) and "free disk space" in str(error)  # noqa: PT017
            break
    assert set(fold(store.history()).live) == store.group_ids() == set(range(group_id))
    store._database.execute("PRAGMA max_page_count = 100000")
    store.append(life_of(group_id))
    store.close()
    assert set(read(path).live) == set(range(group_id + 1))


def test_a_redis_without_memory_left_loses_nothing(own_redis):
    server = own_redis()
    store = RedisStore(server.url, "run", reconnect_seconds=1)
    store.append(life_of(0))
    server.client().config_set("maxmemory", 1)
    refused("has no room left.*raise its maxmemory", store.append, life_of(1))
    server.client().config_set("maxmemory", 0)
    store.append(life_of(1))
    again = RedisStore(server.url, "run")
    assert set(fold(again.history()).live) == again.group_ids() == {0, 1}


def test_a_redis_that_stays_away_ends_the_run_after_the_time_given(own_redis):
    server = own_redis()
    store = RedisStore(server.url, "run", reconnect_seconds=0.5)
    store.append(life_of(0))
    server.kill()
    began = time.monotonic()
    refused("does not answer.*goes on with --resume", store.append, life_of(1))
    assert 0.2 < time.monotonic() - began < 5
    server.start()
    assert RedisStore(server.url, "run").group_ids() == {0}


def test_a_redis_that_still_reads_its_file_is_waited_for(own_redis):
    server = own_redis()
    store = RedisStore(server.url, "run")
    store.append(life_of(0))
    with server.client().pipeline(transaction=False) as pipeline:
        for number in range(20_000):  # it answers after every 1024
            pipeline.set(f"somebody-elses-{number}", "")
        pipeline.execute()
    server.kill()
    server.settings += ("--key-load-delay", "100")  # microseconds
    server.start()
    refused("does not answer.*oading", RedisStore, server.url, "run", reconnect_seconds=0)
    assert RedisStore(server.url, "run", reconnect_seconds=20).group_ids() == {0}


def test_a_redis_that_does_not_answer_is_named():
    message = refused(
        "does not answer.*check store.url", RedisStore, "redis://127.0.0.1:1/0", "run"
    )
    assert "redis://127.0.0.1:1/0" in message


def test_a_redis_that_wants_a_password_says_where_to_put_it(own_redis, monkeypatch, tmp_path):
    server = own_redis("--requirepass", "sesame")
    refused("wants another password.*store.password_env", RedisStore, server.url, "run")
    refused("wants another password", RedisStore, server.url, "run", password="open")
    config = RedisStoreConfig(type="redis", url=server.url, password_env="LEDGER_PASSWORD")
    with pytest.raises(ConfigError, match="LEDGER_PASSWORD, which is not set"):
        open_store(config, tmp_path, "run")
    monkeypatch.setenv("LEDGER_PASSWORD", "sesame")
    open_store(config, tmp_path, "run").append(life_of(0))


def test_a_password_in_the_url_is_refused_because_the_configuration_is_saved():
    with pytest.raises(ValidationError, match="holds a password"):
        TypeAdapter(StoreConfig).validate_python(
            {"type": "redis", "url": "redis://:sesame@host:6379/0"}
        )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (("--appendonly", "no"), "keeps no append-only file"),
        (("--maxmemory-policy", "allkeys-lru"), "evicts keys"),
    ],
)
def test_a_redis_that_forgets_is_refused(own_redis, settings, complaint):
    refused(complaint, RedisStore, own_redis(*settings).url, "run")


@pytest.mark.parametrize(("schema", "name"), [(SCHEMA + 1, "newer"), (SCHEMA - 1, "older")])
def test_a_redis_ledger_of_another_schema_is_refused_and_left_as_it_is(shared_redis, schema, name):
    client = shared_redis.client()
    RedisStore(shared_redis.url, name).append(life_of(0))
    client.set(f"paceline:{name}:schema", schema)
    before = client.dump(f"paceline:{name}:journal")
    refused(f"has schema {schema}.*{name} version", RedisStore, shared_redis.url, name)
    assert client.dump(f"paceline:{name}:journal") == before


@pytest.mark.parametrize("field", ["events", "samples"])
def test_a_damaged_redis_entry_is_named(shared_redis, field):
    name = f"damaged-{field}"
    good = {"events": "[]", "samples": "{}", "owner": "x"}
    shared_redis.client().xadd(f"paceline:{name}:journal", good | {field: "{["}, id="1-1")

    def read_all():
        list(RedisStore(shared_redis.url, name).history())

    refused("is damaged", read_all)


def test_a_missing_redis_entry_is_named(shared_redis):
    for group_id in range(3):
        store = RedisStore(shared_redis.url, "gap")
        store.append(life_of(group_id))
    shared_redis.client().xdel("paceline:gap:journal", "2-1")
    refused("entry 2 .* is missing or damaged", RedisStore, shared_redis.url, "gap")


def test_the_lock_does_not_outlive_its_process_and_is_no_program(path):
    lock = path.with_name("ledger.sqlite.lock")
    assert not lock.stat().st_mode & stat.S_IXUSR
