"""Run one side of a comparison, or a function, in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from paceline.controller.bench.harness.result import BenchError

T = TypeVar("T")

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


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """Return the result of a function run in a fresh process: nothing lingers from before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def side_by_side(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Return the results of functions run at the same time, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = [
            stack.enter_context(ProcessPoolExecutor(max_workers=1, mp_context=context))
            for _ in functions
        ]
        for start in [pool.submit(os.getpid) for pool in pools]:
            start.result()  # all of them are up before any begins
        running = [pool.submit(each) for pool, each in zip(pools, functions, strict=True)]
        return [each.result() for each in running]
