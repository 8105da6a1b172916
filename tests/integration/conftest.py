"""Runs that several tests look at; each is made once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.commands import Command, Ended, Process, Run, run_in

LEARNS_QUICKLY = (
    "learner.optimizer.learning_rate=1e-2",
    "learner.optimizer.warmup_steps=0",
)
"""A dozen steps then change what the model says: comparing models means something."""


def train(name: str, *overrides: str) -> list[str]:
    """Arguments of a run of the debug recipe in ``runs/name``."""
    return ["train", "debug", f"name={name}", "output_dir=runs", *overrides]


@dataclass(frozen=True)
class FinishedRun:
    """A run that went to its end: what Ray's workers were called in its midst, what it said, and
    what was left of it on the machine."""

    run: Run
    at_work: list[str]
    ended: Ended
    processes: list[Process]
    shared_folders: list[Path]
    seconds: float
    root: Path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> FinishedRun:
    """An asynchronous run of the debug recipe, undisturbed."""
    root = tmp_path_factory.mktemp("finished")
    arguments = train(
        "finished",
        "loop.num_steps=12",
        "loop.max_lag=1",
        "checkpoint.every_steps=5",
        *LEARNS_QUICKLY,
    )
    began = time.monotonic()
    run = run_in(root, "finished")
    with Command(*arguments, cwd=root) as command:
        command.wait_until(lambda: run.has_done(1), "a step was done")
        titles = [process.title for process in command.processes()]
        at_work = [title for title in titles if title.startswith("ray::")]
        code = command.wait()
        seconds = time.monotonic() - began
        command.wait_until_nothing_is_left()
        return FinishedRun(
            run,
            at_work,
            Ended(code, command.output, command.errors),
            command.processes(),
            command.shared_folders(),
            seconds,
            root,
        )
