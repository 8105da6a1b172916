"""Interface of graders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paceline.configs.vocabulary import Prompt


class Grader(Protocol):
    """Scorer of one prompt's completions, run in a process of its own, under a time limit."""

    def grade(self, prompt: Prompt, completions: Sequence[str]) -> Sequence[float]:
        """Return one finite reward for each completion, in their order."""
        ...
