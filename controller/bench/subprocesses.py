"""Run one side of a comparison in a process of its own, one torch thread unless told otherwise."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from paceline.controller.bench.result import BenchError

TIME_LIMIT_SECONDS = 1800


def run_logged(command: Sequence[str], log: Path, num_threads: int = 1) -> None:
    """Run a command to its end, its output in ``log``.

    Raises:
        BenchError: it failed, or took longer than half an hour; with the last line it wrote.
    """
    threads = str(num_threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=TIME_LIMIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BenchError(
                f"a run of the benchmark took longer than {TIME_LIMIT_SECONDS} s: see {log}"
            ) from error
    if done.returncode != 0:
        raise BenchError(
            f"a run of the benchmark ended with status {done.returncode}: {_last_line(log)} "
            f"(all of it: {log})"
        )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
