"""The command line as a user starts it, and the processes it brings to life."""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.recorder import read_records
from paceline.controller.observe.files.records import EvaluationRecord, StepRecord
from paceline.controller.observe.files.summary import RunSummary
from paceline.rollout.process_environment import engine_environment

SCRIPTS = Path(sysconfig.get_path("scripts"))
PATIENCE_SECONDS = 400.0
"""How long anything may take on a busy machine: a hang is found, slowness is not a failure."""

MARK = "PACELINE_TEST_COMMAND"
"""Environment variable that names a command's processes, however they are related to it."""


def user_environment() -> dict[str, str]:
    """A user's environment: without what tests and Ray set for themselves, and offline."""
    ours = {*engine_environment(on_gpu=False), "RAY_ADDRESS"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Process:
    """A process of a command, read from ``/proc``."""

    pid: int

    @property
    def title(self) -> str:
        """What it says it is."""
        return _read(self.pid, "cmdline").replace("\0", " ").strip()

    def has_mapped(self, part: str) -> bool:
        """Whether a file with ``part`` in its path is in its memory."""
        return part in _read(self.pid, "maps")

    @property
    def cpu_seconds(self) -> float:
        """User and system time it has used."""
        fields = _read(self.pid, "stat").rpartition(") ")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End it as the kernel ends a process when memory runs out."""
        os.kill(self.pid, signal.SIGKILL)


class Command:
    """A started ``paceline`` command. Leaving the block ends whatever is left of it."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        program: str = "paceline",
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._output = cwd / f"output-{self._mark}.txt"
        self._errors = cwd / f"errors-{self._mark}.txt"
        with self._output.open("w") as output, self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [str(SCRIPTS / program), *arguments],
                cwd=cwd,
                env=user_environment() | dict(environment or {}) | {MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has written to standard output so far."""
        return self._output.read_text()

    @property
    def errors(self) -> str:
        """What it has written to standard error so far."""
        return self._errors.read_text()

    def processes(self) -> list[Process]:
        """Every living process that it or its descendants started."""
        mark = f"{MARK}={self._mark}"
        pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [Process(pid) for pid in pids if mark in _read(pid, "environ").split("\0")]

    def actors(self) -> list[Process]:
        """Its rollout workers and learner ranks."""
        hosts = ("ray::RolloutWorker", "ray::RankHost")
        return [each for each in self.processes() if each.title.startswith(hosts)]

    def rollout_workers(self) -> list[Process]:
        """Its actors with an engine in them."""
        return [actor for actor in self.actors() if actor.has_mapped("/vllm/")]

    def learner_ranks(self) -> list[Process]:
        """Its actors that publish weights."""
        return [
            actor
            for actor in self.actors()
            if actor.has_mapped("/dev/shm/paceline-") and not actor.has_mapped("/vllm/")
        ]

    def shared_folders(self) -> list[Path]:
        """What it has in shared memory; it may be over."""
        return list(Path("/dev/shm").glob(f"paceline-{self.process.pid}-*"))

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait while it runs; fail, with its output, where it ends before."""
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self._transcript()}"
            self._check_patience(what)
            time.sleep(0.05)

    def wait(self) -> int:
        """Its exit code."""
        while self.process.poll() is None:
            self._check_patience("it ended")
            time.sleep(0.05)
        return self.process.returncode

    def wait_until_nothing_is_left(self) -> None:
        """Ray's processes end on their own, soon after the command."""
        while left := self.processes():
            titles = ", ".join(process.title for process in left)
            self._check_patience(f"its processes were gone ({titles})")
            time.sleep(0.1)

    def interrupt(self) -> None:
        """Ctrl-C on a terminal: the signal goes to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """Kill the process group: the command and the parts of Ray that it started itself."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        self._deadline = time.monotonic() + PATIENCE_SECONDS
        return self

    def __exit__(self, *_: object) -> None:
        while left := self.processes():
            for process in left:
                process.kill()
            self.process.poll()
            time.sleep(0.1)

    def _check_patience(self, what: str) -> None:
        assert time.monotonic() < self._deadline, f"waited too long until {what}:\n" + (
            self._transcript()
        )

    def _transcript(self) -> str:
        return f"{self.output}\n{self.errors}"


@dataclass(frozen=True)
class Ended:
    """A command that is over."""

    code: int
    output: str
    errors: str


def run(
    *arguments: str,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    program: str = "paceline",
) -> Ended:
    """Run a command to its end."""
    with Command(*arguments, cwd=cwd, environment=environment, program=program) as command:
        code = command.wait()
        return Ended(code, command.output, command.errors)


@dataclass(frozen=True)
class Run:
    """The folder of a training run, as far as it has come."""

    folder: RunFolder

    @property
    def steps(self) -> list[StepRecord]:
        """Records of training steps."""
        records = read_records(self.folder)
        return [r for r in records if isinstance(r, StepRecord) and r.phase == "train"]

    @property
    def evaluations(self) -> dict[str, EvaluationRecord]:
        """Evaluations by their label."""
        records = read_records(self.folder)
        return {r.label: r for r in records if isinstance(r, EvaluationRecord)}

    @property
    def summary(self) -> RunSummary:
        """How it ended."""
        summary = RunSummary.read(self.folder)
        assert summary is not None, f"no summary in {self.folder.root}"
        return summary

    @property
    def log(self) -> str:
        """Its log."""
        return self.folder.log.read_text()

    def has_done(self, num_steps: int) -> bool:
        """Whether so many training steps are recorded."""
        return len(self.steps) >= num_steps


def run_in(root: Path, name: str) -> Run:
    """The run of this name under ``root/runs``, which need not have begun."""
    return Run(RunFolder(root / "runs" / name))


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # it ended meanwhile, or is somebody else's
        return ""
