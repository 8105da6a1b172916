"""A real Redis server, and stores of every kind."""

from __future__ import annotations

import time

import pytest

from paceline.controller.ledger.memory import MemoryStore
from paceline.controller.ledger.redis_streams import RedisStore
from paceline.controller.ledger.sqlite import SQLiteStore
from tests.redis_server import RedisServer


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def own_redis(tmp_path):
    """Starts servers that a test may kill; they all end with it."""
    servers = []

    def start(*settings: str) -> RedisServer:
        folder = tmp_path / f"redis-{len(servers)}"
        folder.mkdir()
        servers.append(RedisServer(folder, *settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


class Opener:
    """Opens the same store again and again, as the lives of a run do."""

    def __init__(self, open_store, survives):
        self._open, self.survives = open_store, survives
        self._opened = []

    def __call__(self):
        if self.survives:
            self.close()
        elif self._opened:
            return self._opened[-1]
        self._opened.append(self._open())
        return self._opened[-1]

    def close(self):
        for store in self._opened:
            store.close()
        self._opened.clear()


@pytest.fixture(params=["memory", "sqlite", "redis"])
def fresh_store(request, tmp_path_factory):
    """Makes openers of empty stores, all of one kind."""
    openers = []

    def make() -> Opener:
        if request.param == "memory":
            opener = Opener(MemoryStore, False)
        elif request.param == "sqlite":
            path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
            opener = Opener(lambda: SQLiteStore(path), True)
        else:
            server = request.getfixturevalue("shared_redis")
            name = f"run-{time.monotonic_ns()}"
            opener = Opener(lambda: RedisStore(server.url, name, reconnect_seconds=1), True)
        openers.append(opener)
        return opener

    yield make
    for opener in openers:
        opener.close()
