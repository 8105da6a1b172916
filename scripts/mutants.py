"""Break the code on purpose, one place at a time, and see that the tests notice.

    make mutants                                    everything in tests/mutations/
    make mutants ONLY=sign                          mutations whose names contain a word
    .venv/bin/python scripts/mutants.py --list      their names and laws
    .venv/bin/python scripts/mutants.py --table     docs/laws.md

It works in copies of the checkout and never changes the checkout itself. First the named tests must
pass in a copy as it is. Exit code 1: a break that no test noticed, or a table that is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from mutations import ROOT, Mutation, all_mutations, page, problems, sections

TEST_SECONDS = 60
"""A test that takes longer is taken for hanging: it fails."""
MUTATION_SECONDS = 400
FAILED = 1
"""Pytest's exit code where tests failed; 2 to 5 are collection, usage and its own errors."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of one mutation: ``caught``, ``SURVIVED`` or ``error``, and why."""

    mutation: Mutation
    verdict: str
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        line = f"{self.verdict:9}{self.seconds:6.1f} s  {self.mutation.name}"
        return f"{line}\n{self.detail}" if self.detail else line


class Copy:
    """A copy of the checkout to break: what git does not ignore, and the compiled extension."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: subprocess.Popen[str] | None = None
        tracked = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\0")
        compiled = [str(path.relative_to(ROOT)) for path in (ROOT / "spec").glob("_native*.so")]
        for name in filter(None, [*tracked, *compiled]):
            if (ROOT / name).exists():  # one that was just removed is still in the index
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)

    @contextmanager
    def broken(self, mutation: Mutation) -> Iterator[None]:
        """Apply a mutation for as long as the block lasts."""
        path = self.folder / mutation.file
        whole = {path: path.read_bytes()}
        whole |= {each: each.read_bytes() for each in self._compiled() if mutation.is_native}
        try:
            self._write(path, mutation.applied(path.read_text(encoding="utf-8")).encode())
            if mutation.is_native:
                build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                self._run(build, MUTATION_SECONDS).check_returncode()
            yield
        finally:
            for each, content in whole.items():
                self._write(each, content)

    def test(self, tests: Sequence[str], seconds: int, *options: str) -> tuple[int, str]:
        """Run tests of the copy; return pytest's exit code and what it said."""
        quiet = ["-q", "--tb=line", "-rfE", "-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}"]
        ran = self._run([sys.executable, "-m", "pytest", *quiet, *options, *tests], seconds)
        return ran.returncode, ran.stdout

    def stop(self) -> None:
        """End what runs in the copy, if anything does."""
        process = self._running
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    def _compiled(self) -> list[Path]:
        return list((self.folder / "spec").glob("_native*.so"))

    def _write(self, path: Path, content: bytes) -> None:
        path.unlink()  # a loaded extension is not written into
        path.write_bytes(content)
        if path.suffix == ".py":
            # byte code is known by size and second, and a mutant may have both in common
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def _run(self, command: Sequence[str], seconds: int) -> subprocess.CompletedProcess[str]:
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        environment |= {"PYTHONPATH": f"{self.folder}/src", "HYPOTHESIS_PROFILE": "mutants"}
        with subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            self._running = process
            try:
                said, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                self.stop()
                said = f"{process.communicate()[0]}\nkilled after {seconds} s"
            except BaseException:
                self.stop()
                raise
        return subprocess.CompletedProcess(command, process.returncode, said)


def judge(mutation: Mutation, code: int, said: str) -> tuple[str, str]:
    """Return the verdict on a mutation from what pytest said, and its reason."""
    passed = [
        test
        for test in mutation.tests
        if not re.search(rf"^FAILED {re.escape(test)}(?=[\[ \n])", said, flags=re.MULTILINE)
    ]
    if code == FAILED and not passed:
        return "caught", ""
    if code in (0, FAILED) and not re.search(r"^ERROR ", said, flags=re.MULTILINE):
        return "SURVIVED", "\n".join(f"          not noticed by {test}" for test in passed)
    return "error", f"pytest's exit code {code}:\n{said[-2000:]}"


def try_out(mutation: Mutation, copies: SimpleQueue[Copy]) -> Outcome:
    """Break a copy and run the tests that are to notice."""
    copy = copies.get()
    started = time.monotonic()
    try:
        with copy.broken(mutation):
            found = judge(mutation, *copy.test(mutation.tests, MUTATION_SECONDS))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        found = "error", str(error)
    finally:
        copies.put(copy)
    return Outcome(mutation, found[0], time.monotonic() - started, found[1])


def run(mutations: Sequence[Mutation], num_copies: int) -> list[Outcome]:
    """Run all of them, so many side by side; exit where the tests fail by themselves."""
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    with tempfile.TemporaryDirectory(prefix="mutants-") as root:
        copies: SimpleQueue[Copy] = SimpleQueue()
        whole = [Copy(Path(root) / str(number)) for number in range(num_copies)]
        print(f"{len(tests)} tests without any mutation", flush=True)
        started = time.monotonic()
        beside = (f"--numprocesses={num_copies}", "--no-loadscope-reorder")
        code, said = whole[0].test(tests, len(tests) * TEST_SECONDS, *beside)
        if code != 0:
            sys.exit(f"{said}\nthe tests fail without any mutation: they would show nothing")
        print(f"passed   {time.monotonic() - started:6.1f} s", flush=True)
        for copy in whole:
            copies.put(copy)
        outcomes = []
        with ThreadPoolExecutor(num_copies) as threads:
            running = [threads.submit(try_out, mutation, copies) for mutation in mutations]
            try:
                for future in as_completed(running):
                    outcomes.append(future.result())
                    print(outcomes[-1], flush=True)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for copy in whole:
                    copy.stop()
                raise
    return outcomes


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="whose names contain it")
    parser.add_argument("--list", action="store_true", help="names and laws")
    parser.add_argument("--table", action="store_true", help="print docs/laws.md")
    parser.add_argument("--copies", type=int, default=2, help="how many run side by side")
    asked = parser.parse_args()
    if asked.table:
        print(page(sections()), end="")
        return
    wanted = asked.only or [""]
    mutations = [m for m in all_mutations() if any(word in m.name for word in wanted)]
    if asked.list:
        print("\n".join(f"{m.name}: {m.law}" for m in mutations))
        return
    if wrong := list(problems(mutations)):
        sys.exit("\n".join(wrong))
    if not mutations:
        sys.exit(f"no mutation is named so: {', '.join(wanted)}; --list names all")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # copies and processes go first
    started = time.monotonic()
    outcomes = run(mutations, asked.copies)
    verdicts = [outcome.verdict for outcome in outcomes]
    print("\n" + "\n".join(sorted(map(str, outcomes), key=str.casefold)))
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("caught", "SURVIVED", "error"))
    print(f"\n{len(outcomes)} mutations in {time.monotonic() - started:.0f} s: {counts}")
    sys.exit(any(verdict != "caught" for verdict in verdicts))


if __name__ == "__main__":
    main()
