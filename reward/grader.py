"""What a grader is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paceline.configs.vocabulary import Prompt


class Grader(Protocol):
    """Scores the completions of one prompt; runs in a process of its own, under a time limit."""

    def grade(self, prompt: Prompt, completions: Sequence[str]) -> Sequence[float]:
        """One finite reward for each completion, in their order."""
        ...
