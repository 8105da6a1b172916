"""Editors find `paceline.*`: real resolvers, asked in a fresh environment."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import jedi
import pytest

from tests.house.checkout import copy_checkout
from tests.house.language_server import language_server

SCRIPTS = Path(sysconfig.get_path("scripts"))
SERVERS = {
    "basedpyright": [SCRIPTS / "basedpyright-langserver", "--stdio"],
    "ty": [SCRIPTS / "ty", "server"],
}
IMPORT = "from paceline.controller.loop import Loop\n\nLoop\n"
LINE, COLUMN = 2, 0
"""Where the imported name is used."""


@pytest.fixture(autouse=True)
def _no_other_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX"):  # resolvers follow these too
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone; without `setup.py` no C++ is compiled when it is installed."""
    folder = tmp_path_factory.mktemp("clone") / "paceline"
    folder.mkdir()
    copy_checkout(folder, "pyproject.toml", "README.md", "LICENSE")
    return folder


@pytest.fixture(scope="module")
def environment(checkout: Path) -> Path:
    """An environment that holds nothing but the clone, installed editable as pip does it."""
    folder = checkout.parent
    build = f"import setuptools.build_meta as b; b.build_editable({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python"]
    install = [*pip, folder / "env" / "bin" / "python", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, wheel], check=True)
    return folder / "env"


@pytest.fixture
def project(tmp_path: Path, environment: Path) -> Path:
    """A file of a user in a folder of theirs, whose tools know the environment."""
    (tmp_path / "pyproject.toml").write_text(
        f'[tool.basedpyright]\nvenvPath = "{environment.parent}"\nvenv = "{environment.name}"\n'
        f'[tool.ty.environment]\npython = "{environment}"\n'
    )
    file = tmp_path / "mine.py"
    file.write_text(IMPORT)
    return file


def test_an_editable_installation_is_one_line_that_every_tool_reads(
    environment: Path, checkout: Path
) -> None:
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (path_file,) = site_packages.glob("*.pth")
    assert path_file.read_text().split() == [str(checkout / "src")]
    assert not list(site_packages.glob("*.py")), "an import hook, which no editor runs"


@pytest.mark.parametrize("server", sorted(SERVERS))
def test_a_users_editor_goes_to_the_definition(server: str, project: Path, checkout: Path) -> None:
    with language_server(SERVERS[server], project.parent) as editor:
        (found,) = editor.definitions(project, LINE, COLUMN)
    assert found.resolve() == checkout / "controller" / "loop.py"


@pytest.mark.parametrize("server", sorted(SERVERS))
def test_an_editor_in_the_repository_needs_no_installation(server: str, checkout: Path) -> None:
    file = checkout / "controller" / "newcomer.py"
    file.write_text(IMPORT)
    with language_server(SERVERS[server], checkout) as editor:
        (found,) = editor.definitions(file, LINE, COLUMN)
    assert found.resolve() == checkout / "controller" / "loop.py"


def test_jedi_goes_to_the_definition(project: Path, environment: Path, checkout: Path) -> None:
    script = jedi.Script(path=project, environment=jedi.create_environment(environment, safe=False))
    (found,) = script.goto(LINE + 1, COLUMN, follow_imports=True)
    assert found.module_path is not None
    assert found.module_path.resolve() == checkout / "controller" / "loop.py"
