"""The benchmarks by name, and how one is run from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from paceline.configs.diagnose import nearest
from paceline.configs.errors import ConfigError
from paceline.controller.bench.buffer import bench_buffer
from paceline.controller.bench.e2e.algorithms import bench_algorithms
from paceline.controller.bench.e2e.asynchrony import bench_async
from paceline.controller.bench.e2e.e2e import bench_e2e
from paceline.controller.bench.harness.result import BenchResult, show
from paceline.controller.bench.learner.learner import bench_learner
from paceline.controller.bench.rollout.rollout import bench_rollout
from paceline.controller.bench.suffix.suffix import bench_suffix

FILE_WIDTH = 160

Bench = Callable[[bool, Path], BenchResult]
"""``(quick, output)``: measure (briefly where ``quick``), with files in the folder ``output``."""

BENCHES: Mapping[str, Bench] = {
    "e2e": bench_e2e,
    "async": bench_async,
    "buffer": bench_buffer,
    "algorithms": bench_algorithms,
    "rollout": bench_rollout,
    "suffix": bench_suffix,
    "learner": bench_learner,
}


def run_bench(name: str, quick: bool, output: Path) -> int:
    """Run a benchmark; print its tables and, as the last line, its result as one JSON object.

    Returns:
        0 where every target is met, 1 where one is missed.

    Raises:
        ConfigError: there is no benchmark of that name.
        BenchError: it could not be run.
    """
    if name not in BENCHES:
        raise ConfigError(
            f"no benchmark {name!r}; there are: {', '.join(BENCHES)}{nearest(name, BENCHES)}"
        )
    output.mkdir(parents=True, exist_ok=True)
    result = BENCHES[name](quick, output)
    # A file has no width: tables are not to be cut to that of a terminal from long ago.
    show(result, Console(width=None if sys.stdout.isatty() else FILE_WIDTH))
    sys.stdout.write(result.as_json() + "\n")
    sys.stdout.flush()
    return 0 if result.all_met else 1
