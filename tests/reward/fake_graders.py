"""Graders that misbehave, importable by the grader processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from paceline.configs.vocabulary import Prompt


class UnpicklableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class ObedientGrader:
    """Does what the completion says, and rewards its length where it says nothing."""

    def __init__(self, pid_file: str | None = None) -> None:
        if pid_file is not None:
            with open(pid_file, "a") as file:
                file.write(f"{os.getpid()}\n")

    def grade(self, prompt: Prompt, completions: Sequence[str]) -> Any:
        match completions[0]:
            case "hang":
                time.sleep(60)
            case "hang deaf":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(60)
            case "raise":
                raise ZeroDivisionError("one\nline")
            case "raise unpicklable":
                raise UnpicklableError("this", "that")
            case "exit":
                sys.exit(3)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "too few":
                return [1.0] * (len(completions) - 1)
            case "nan":
                return [float("nan")] * len(completions)
            case "words":
                return ["good"] * len(completions)
            case "pid":
                return [float(os.getpid())] * len(completions)
        return [len(completion) for completion in completions]


class UnbuildableGrader:
    def __init__(self) -> None:
        raise OSError("no judge at this address")


class GraderWithoutGrade:
    pass
