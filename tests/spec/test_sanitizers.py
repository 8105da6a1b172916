"""The native history under the compiler's sanitizers: memory, undefined behaviour, data races.

Needs g++ (or what CXX names, a clang++ will do) with its sanitizer libraries: on Debian and Ubuntu
they come with g++, Fedora has libasan, libubsan and libtsan. Without them the tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "spec" / "native"
COMPILER = os.environ.get("CXX", "g++")


def compile_with(sanitizers: str, program: Path) -> None:
    """Everything in one translation unit: half the time."""
    native = [path for path in sorted(NATIVE.glob("*.cpp")) if path.name != "binding.cpp"]
    sources = [*native, Path(__file__).parent / "native" / "fuzz.cpp"]
    unit = program.with_suffix(".cpp")
    unit.write_text("".join(f'#include "{path}"\n' for path in sources))
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    subprocess.run(
        [COMPILER, *flags, *sanitize, f"-I{NATIVE}", str(unit), "-o", str(program)], check=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_history_is_clean_under(sanitizers: str, tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}")
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    link = [COMPILER, f"-fsanitize={sanitizers}", str(empty), "-o", str(tmp_path / "empty")]
    if subprocess.run(link, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{COMPILER} has no libraries for -fsanitize={sanitizers}")
    if subprocess.run([tmp_path / "empty"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"programs with -fsanitize={sanitizers} do not start on this kernel")
    compile_with(sanitizers, tmp_path / "fuzz")
    done = subprocess.run(
        [tmp_path / "fuzz", "0", "30"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
