"""A Redis of a benchmark's own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from paceline.controller.bench.harness.result import BenchError

START_SECONDS = 20.0


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run a redis-server with an append-only file in ``folder``; gives its URL.

    Raises:
        BenchError: it is not installed, or does not start.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise BenchError("this benchmark needs redis-server: `apt-get install redis-server`")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder.resolve())]
    arguments += ["--appendonly", "yes", "--save", "", "--auto-aof-rewrite-min-size", "1gb"]
    process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise BenchError(f"redis-server did not start within {START_SECONDS:.0f} s")
