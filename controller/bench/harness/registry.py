"""The benchmarks by name, and how one is run from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from rich.console import Console

from paceline.configs.diagnose import nearest
from paceline.configs.errors import ConfigError
from paceline.controller.bench.harness.result import BenchResult, show

FILE_WIDTH = 160

Bench = Callable[[bool, Path], BenchResult]
"""``(quick, output)``: measure (briefly where ``quick``), with files in the folder ``output``."""

BENCHES: Mapping[str, str] = {
    "e2e": "e2e.e2e:bench_e2e",
    "async": "e2e.asynchrony:bench_async",
    "buffer": "buffer:bench_buffer",
    "algorithms": "e2e.algorithms:bench_algorithms",
    "rollout": "rollout.rollout:bench_rollout",
    "suffix": "suffix.suffix:bench_suffix",
    "learner": "learner.learner:bench_learner",
}
"""Where each is found. One is imported when it is run: torch and its like take seven seconds."""


def find_bench(name: str) -> Bench:
    """Import a benchmark.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in BENCHES:
        raise ConfigError(
            f"no benchmark {name!r}; there are: {', '.join(BENCHES)}{nearest(name, BENCHES)}"
        )
    module, function = BENCHES[name].split(":")
    bench: Bench = getattr(import_module(f"paceline.controller.bench.{module}"), function)
    return bench


def run_bench(name: str, quick: bool, output: Path) -> int:
    """Run a benchmark; print its tables and, as the last line, its result as one JSON object.

    Returns:
        0 where every target is met, 1 where one is missed.

    Raises:
        ConfigError: there is no benchmark of that name.
        BenchError: it could not be run.
    """
    bench = find_bench(name)
    output.mkdir(parents=True, exist_ok=True)
    result = bench(quick, output)
    # A file has no width: tables are not to be cut to that of a terminal from long ago.
    show(result, Console(width=None if sys.stdout.isatty() else FILE_WIDTH))
    sys.stdout.write(result.as_json() + "\n")
    sys.stdout.flush()
    return 0 if result.all_met else 1
