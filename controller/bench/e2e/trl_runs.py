"""The peer's side: TRL's GRPOTrainer in a process of its own."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from paceline.configs.schema import RunConfig
from paceline.controller.bench.e2e.trl_job import Problem, TRLJob
from paceline.controller.bench.e2e.workload import Workload
from paceline.controller.bench.harness.result import BenchError
from paceline.controller.bench.harness.subprocesses import run_logged


def require_trl() -> None:
    """Make sure that the peer is installed.

    Raises:
        BenchError: it is not.
    """
    if importlib.util.find_spec("trl") is None:
        raise BenchError(
            "the benchmark compares with TRL, which is not installed: pip install 'paceline[dev]'"
        )


def training_problems(config: RunConfig, count: int) -> tuple[Problem, ...]:
    """Return the first ``count`` problems that Paceline trains on with ``config``, in order."""
    from paceline.controller.data.tokenizer import load_tokenizer
    from paceline.controller.wiring.preparation import prompt_set

    prompts = prompt_set(config, load_tokenizer(config.model))
    feed = itertools.islice(prompts.feed(), count)
    return tuple(Problem(prompt.text, prompt.reference or "") for _, prompt in feed)


def train_trl(
    name: str,
    folder: Path,
    workload: Workload,
    model: Path,
    problems: Sequence[Problem],
    num_steps: int,
    num_threads: int = 1,
) -> list[Mapping[str, float]]:
    """Run the peer for ``num_steps``; return what each step spent and processed.

    Raises:
        BenchError: the run failed.
    """
    run = folder / name
    run.mkdir(parents=True, exist_ok=True)
    job_file, answer_file = run / "job.json", run / "answer.json"
    answer_file.unlink(missing_ok=True)
    TRLJob.of(workload, model, problems, num_steps, answer_file).write(job_file)
    module = "paceline.controller.bench.e2e.trl_trainer"
    run_logged([sys.executable, "-m", module, str(job_file)], folder / f"{name}.log", num_threads)
    steps: list[Mapping[str, float]] = json.loads(answer_file.read_text(encoding="utf-8"))["steps"]
    return steps
