"""The import contracts in pyproject.toml catch what they are there for."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.house.checkout import PACKAGES, ROOT

LINT_IMPORTS = Path(sysconfig.get_path("scripts")) / "lint-imports"


@pytest.fixture
def empty_packages(tmp_path: Path) -> Path:
    """The packages without their code, under the real contracts."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(pyproject)
    (tmp_path / "paceline").mkdir()
    (tmp_path / "paceline" / "__init__.py").touch()
    for package in PACKAGES:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            empty = tmp_path / "paceline" / folder.relative_to(ROOT)
            empty.mkdir(parents=True, exist_ok=True)
            for name in {"module.py", *(path.name for path in folder.glob("*.py"))}:
                (empty / name).touch()
    (tmp_path / "paceline" / "controller" / "module.py").unlink()  # every one has its floor there
    (tmp_path / "paceline" / "learner" / "module.py").unlink()
    return tmp_path


def broken_contracts(folder: Path) -> str:
    """What lint-imports says of the folder; empty if every contract is kept."""
    done = subprocess.run(
        [LINT_IMPORTS, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "Contracts:" in said, said
    return said if done.returncode else ""


@pytest.mark.parametrize(
    ("file", "imported", "contract"),
    [
        ("configs/module.py", "torch", "configs runs without"),
        (
            "configs/schema/module.py",
            "paceline.configs.forecast.module",
            "The schema knows nothing",
        ),
        (
            "controller/data/module.py",
            "paceline.controller.ledger.module",
            "folders import downwards",
        ),
        (
            "controller/engines/module.py",
            "paceline.controller.ranks.module",
            "folders import downw",
        ),
        ("controller/loop.py", "torch", "hold no tensors"),
        ("controller/new.py", "os", "folders import downwards"),
        ("controller/parts.py", "paceline.controller.loop", "folders import downwards"),
        ("controller/verify/module.py", "vllm", "Only rollout imports vLLM"),
        ("controller/run/module.py", "paceline.rollout.module", "wiring alone"),
        ("kernels/module.py", "paceline.spec.module", "Packages import downwards"),
        ("learner/engines/module.py", "paceline.learner.objective.module", "what is optimised"),
        ("learner/step.py", "vllm", "Only rollout imports vLLM"),
        ("learner/step.py", "paceline.rollout.module", "Packages import downwards"),
        ("learner/step.py", "paceline.spec.module", "how rollouts are drafted"),
        ("reward/module.py", "paceline.weights_sync.module", "reward stands alone"),
        ("rollout/module.py", "paceline.controller.loop", "Packages import downwards"),
        ("rollout/module.py", "paceline.kernels.module", "Only spec and learner use kernels"),
        ("rollout/worker.py", "vllm", "loads without vLLM"),
        ("spec/history.py", "paceline.spec.proposer", "The history of drafts"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(
    empty_packages: Path, file: str, imported: str, contract: str
) -> None:
    (empty_packages / "paceline" / file).write_text(f"import {imported}\n")
    broken = [line for line in broken_contracts(empty_packages).splitlines() if "BROKEN" in line]
    assert any(contract in line for line in broken), broken


ALLOWED = [
    ("controller/wiring/module.py", "paceline.learner.worker"),
    ("controller/bench/module.py", "torch"),
    ("controller/bench/module.py", "paceline.rollout.module"),
    ("controller/verify/module.py", "torch"),
    ("controller/verify/module.py", "paceline.rollout.module"),
    ("learner/step.py", "paceline.kernels.module"),
    ("rollout/module.py", "vllm"),
    ("spec/module.py", "paceline.configs.module"),
]


def test_the_allowed_imports_together_break_nothing(empty_packages: Path) -> None:
    for file, imported in ALLOWED:
        with (empty_packages / "paceline" / file).open("a") as module:
            module.write(f"import {imported}\n")
    assert broken_contracts(empty_packages) == ""
