"""Grading of completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from paceline.configs.schema.base import Section


class GraderLimits(Section):
    """Limits of every grader: it runs outside the loop's process, under a time limit."""

    time_limit_seconds: float = Field(default=10.0, gt=0)
    """Grading one group may take this long; a grader that hangs is killed."""

    num_processes: int = Field(default=1, ge=1)
    """Processes that grade side by side."""

    on_error: Literal["fail", "drop"] = "fail"
    """When a grader raises or hangs: end the run with its error, or drop the group."""

    require_finish: bool = True
    """Reward 0 for completions cut off by the token limit."""


class ReasoningGymGrader(GraderLimits):
    """The reasoning-gym task's own `score_answer`."""

    type: Literal["reasoning_gym"]
    threshold: float = Field(default=1.0, gt=0, le=1)
    """Reward is 1 where the score reaches this, else 0 (some tasks' partial credit is hackable)."""


class ExactGrader(GraderLimits):
    """Reward 1 where the completion equals the reference."""

    type: Literal["exact"]
    pattern: str | None = None
    """Regular expression whose first group is compared; the whole completion when absent."""

    ignore_case: bool = False
    """Compare without regard to case."""


class MathGrader(GraderLimits):
    """Reward 1 where math-verify finds the answer equal to the reference."""

    type: Literal["math"]


class ImportedGrader(GraderLimits):
    """A grader of your own, imported by name."""

    type: Literal["import"]
    import_path: str
    """`package.module:ClassName`; called with `parameters`, must offer
    `grade(prompt, completions) -> rewards`."""

    parameters: dict[str, Any] = {}
    """Keyword arguments of the class."""


GraderConfig = Annotated[
    ReasoningGymGrader | ExactGrader | MathGrader | ImportedGrader, Field(discriminator="type")
]
