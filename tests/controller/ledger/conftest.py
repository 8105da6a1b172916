"""A real Redis server, and stores of every kind."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import redis

from paceline.controller.ledger.memory import MemoryStore
from paceline.controller.ledger.redis_streams import RedisStore
from paceline.controller.ledger.sqlite import SQLiteStore


class RedisServer:
    """A redis-server of our own: it can be killed, and started again from its file."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.program = shutil.which("redis-server")
        assert self.program, (
            "these tests need redis-server: run `make test`, which installs it, or "
            "`apt-get install redis-server`"
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.settings = folder, settings
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        arguments += ["--appendonly", "yes", "--save", "", *self.settings]
        self.process = subprocess.Popen(
            [str(self.program), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        raise AssertionError("redis-server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port)


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
