"""What is on disk is what is packaged: packages, their subpackages, recipes and native code."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.house.checkout import LINKS, PACKAGES, ROOT, copy_checkout


def packages_on_disk() -> set[str]:
    """Every folder that holds Python files, as the package it is imported as."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    folders = {path.parent.relative_to(ROOT) for path in files}
    return {".".join(["paceline", *folder.parts]) for folder in folders}


def modules_on_disk() -> list[str]:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    paths = (path.relative_to(ROOT).with_suffix("") for path in files)
    names = {".".join(["paceline", *path.parts]) for path in paths}
    return sorted(name.removesuffix(".__init__") for name in names)


def test_every_folder_at_the_top_with_an_importable_package_is_linked_under_its_own_name() -> None:
    folders = {file.parent.name for file in ROOT.glob("*/*.py")} - {"scripts", "tests"}
    assert set(PACKAGES) == folders
    for package in PACKAGES:
        assert str((LINKS / package).readlink()) == f"../../{package}", (
            "an absolute link is this machine's"
        )


def test_every_package_but_kernels_says_in_its_init_what_it_is() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "would shadow Hugging Face's kernels"
    for package in sorted(packages_on_disk() - {"paceline.kernels"}):
        init = ROOT.joinpath(*package.split(".")[1:], "__init__.py")
        assert init.exists(), f"{package} has no __init__.py"
        assert ast.get_docstring(ast.parse(init.read_text())), f"{init} has no docstring"


def test_a_build_without_a_compiler_says_what_to_install(tmp_path: Path) -> None:
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--force", *folders],
        cwd=ROOT,
        env={**os.environ, "CC": "/nonexistent", "CXX": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "needs a C++17 compiler" in done.stderr
    assert "apt install g++ python3-dev" in done.stderr
    assert "/nonexistent" in done.stderr


def run_alone(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that finds no Paceline but the wheel's, whatever this process finds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(part) for part in command]
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel; dependencies come from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    copy_checkout(source, "pyproject.toml", "setup.py", "README.md", "LICENSE")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run_alone(*build, "--wheel-dir", folder, source)
    run_alone(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    run_alone(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    # A path line makes this environment's packages visible and leaves their .pth files, the
    # editable installation of Paceline among them, unread.
    (site_packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


WRITE_REPORT = """
import sys
from pathlib import Path
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.report.report import write_report
folder = RunFolder.create(Path(sys.argv[1]))
folder.write_config("name: run")
print(write_report(folder).read_text())
"""
IMPORT_ALL = """
import importlib, json, sys
failed, files = {}, []
for name in json.loads(sys.argv[1]):
    try:
        files.append(importlib.import_module(name).__file__)
    except BaseException as error:
        failed[name] = repr(error)
print(json.dumps([failed, files]))
"""


@pytest.mark.slow
def test_every_module_imports_from_the_wheel(installed_wheel: Path) -> None:
    names = json.dumps([*modules_on_disk(), "paceline.spec._native"])
    done = run_alone(installed_wheel, "-I", "-c", IMPORT_ALL, names, cwd=installed_wheel.parent)
    failed, files = json.loads(done.stdout.splitlines()[-1])
    assert failed == {}
    environment = str(installed_wheel.parents[1])
    outside = [file for file in files if file and not file.startswith(environment)]
    assert outside == [], "imported from elsewhere than the wheel"


@pytest.mark.slow
def test_the_wheel_carries_the_recipes_and_the_type_stubs(installed_wheel: Path) -> None:
    (packaged,) = installed_wheel.parents[1].glob("lib/python*/site-packages/paceline")
    recipes = {path.name for path in (ROOT / "configs" / "recipes").glob("*.yaml")}
    assert {path.name for path in (packaged / "configs" / "recipes").glob("*.yaml")} == recipes
    assert (packaged / "spec" / "_native.pyi").exists()
    assert (packaged / "py.typed").exists()


@pytest.mark.slow
def test_a_report_is_written_from_the_wheel(installed_wheel: Path, tmp_path: Path) -> None:
    done = run_alone(installed_wheel, "-I", "-c", WRITE_REPORT, tmp_path / "run", cwd=tmp_path)
    assert "How to reproduce it" in done.stdout


@pytest.mark.slow
def test_every_folder_with_python_files_is_in_the_wheel_and_nothing_else(
    installed_wheel: Path,
) -> None:
    (packaged,) = installed_wheel.parents[1].glob("lib/python*/site-packages/paceline")
    folders = {path.parent.relative_to(packaged.parent) for path in packaged.rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == packages_on_disk() | {"paceline"}


@pytest.mark.slow
def test_the_command_line_of_the_wheel_starts(installed_wheel: Path) -> None:
    command = installed_wheel.parent / "paceline"
    done = run_alone(command, "--help")
    assert "train" in done.stdout
