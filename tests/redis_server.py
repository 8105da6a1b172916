"""A real Redis server for tests."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

import redis

INSTALL = "run `make test`, which installs it, or `apt-get install redis-server`"


def find_program() -> str | None:
    """Return the path of redis-server, if there is one."""
    return shutil.which("redis-server")


class RedisServer:
    """A redis-server of our own: it can be killed, and started again from its file."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.program = find_program()
        assert self.program, f"these tests need redis-server: {INSTALL}"
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
