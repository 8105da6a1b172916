"""Paceline's side: its own command line in a process of its own, read through ``metrics.jsonl``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from paceline.configs.load import load_config
from paceline.configs.schema import RunConfig
from paceline.controller.bench.e2e.workload import RECIPE, Workload
from paceline.controller.bench.harness.compare import progress
from paceline.controller.bench.harness.subprocesses import run_logged
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.recorder import read_records
from paceline.controller.observe.files.records import StepRecord


def initial_model(workload: Workload, folder: Path) -> dict[str, str]:
    """Return the overrides that start a run from the workload's model; it is made once.

    The model is the quick start's, after its supervised warm start and one step of reinforcement
    learning: its completions have realistic lengths and some of them are right.

    Raises:
        BenchError: the warm start failed.
    """
    name = f"initial-{workload.name}"
    final = RunFolder(folder / name).final
    if not (final / "config.json").exists():
        progress(f"making the initial model first, for a minute or two: {final}")
        overrides = {
            **workload.shared_overrides(),
            **workload.warm_start,
            "loop.num_steps": "1",
            "evaluation.every_steps": "null",
            "checkpoint.every_steps": "null",
            "observability.live": "false",
        }
        train(name, folder, overrides)
    return {"model.path": str(final), "model.architecture": "null"}


def train(name: str, folder: Path, overrides: Mapping[str, str]) -> list[StepRecord]:
    """Run ``paceline train`` on the quick start; return the records of its RL steps.

    What an earlier run of the same name left in ``folder`` is removed.

    Raises:
        BenchError: the run failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder / name)
    shutil.rmtree(run.root, ignore_errors=True)
    arguments = _arguments({**overrides, "name": name, "output_dir": str(folder)})
    program = str(Path(sys.executable).with_name("paceline"))
    run_logged([program, "train", RECIPE, *arguments], folder / f"{name}.log")
    records = read_records(run)
    return [r for r in records if isinstance(r, StepRecord) and r.phase == "train"]


def resolve(overrides: Mapping[str, str]) -> RunConfig:
    """Return the configuration that ``train`` runs with these overrides."""
    return load_config(RECIPE, _arguments({**overrides, "name": "resolved"}))


def _arguments(overrides: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in overrides.items()]
