"""Dependencies: what is imported is declared, and what is declared is explained."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from tests.house.checkout import PACKAGES, ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Parts of a declared package under a name of their own: pinned by it, never chosen by us.
PARTS = {
    "huggingface-hub": "transformers",
    "pydantic-core": "pydantic",
    "tokenizers": "transformers",
    "triton": "vllm",
}


def distribution(requirement: str) -> str:
    """The normalised name in a requirement, or of a distribution."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def declared() -> set[str]:
    extras = PROJECT["optional-dependencies"].values()
    return {distribution(each) for each in sum(extras, PROJECT["dependencies"])}


def imported_packages(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_every_imported_package_is_declared() -> None:
    providers = packages_distributions()
    known = declared() | set(PARTS)
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    unknown = {
        f"{file.relative_to(ROOT)} imports {package}"
        for file in files
        for package in imported_packages(file)
        if package != "paceline"
        and package not in sys.stdlib_module_names
        and not {distribution(name) for name in providers.get(package, [package])} & known
    }
    assert unknown == set()


def test_parts_belong_to_declared_packages() -> None:
    assert set(PARTS.values()) <= declared()


def test_contributing_has_one_line_for_every_dependency_and_no_other() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Dependencies")[1]
    explained = re.findall(r"^\| `([^`]+)`", section, flags=re.MULTILINE)
    assert sorted(distribution(name) for name in explained) == sorted(declared())
