"""What one step, one evaluation, one sample was: the lines of a run's JSON Lines files.

A record writes itself as a plain dictionary and reads itself back from one. Reading forgives: a
key that is missing or of the wrong type is "not measured", so that a report can be made of any
run, an old or a broken one too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from paceline.controller.observe.files.jsonl import plain

Phase = Literal["warm_start", "train"]
EvaluationLabel = Literal["initial", "validation", "after_warm_start", "before", "during", "after"]

WARM_START_LABELS = ("initial", "validation", "after_warm_start")
"""Labels whose step counts the warm start's steps; the others count training's."""

PHASES: tuple[Phase, ...] = get_args(Phase)
EVALUATION_LABELS: tuple[EvaluationLabel, ...] = get_args(EvaluationLabel)

OVERLAPPING_PARTS = ("generate", "sync")
"""Parts of the time split that run beside the others: they do not add up to the step's duration."""

WHOLE_STEP = "step"
"""The part of the time split that is all of it; what no other part explains is shown as other."""


def standard_error(accuracy: float, num_prompts: int) -> float:
    """Return the binomial standard error of an accuracy over independent right-or-wrong prompts."""
    return math.sqrt(max(0.0, accuracy * (1.0 - accuracy)) / num_prompts) if num_prompts else 0.0


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step. ``None`` is "not measured" (a warm start has no rewards, for example).

    ``step`` counts the finished optimiser steps of its phase, from 1; ``seconds`` is wall time
    since the start of the run. ``metrics`` are the learner's (entropy, ratio_max, clip_fraction,
    kl, grad_norm, learning_rate, padding_fraction, …). ``time`` splits the step's wall time in
    seconds by part; the parts in ``OVERLAPPING_PARTS`` run beside the others. ``dropped`` counts
    groups by reason since the previous record; ``buffer`` counts groups by state.
    """

    phase: Phase
    step: int
    seconds: float
    reward: float | None = None
    reward_std: float | None = None
    length_p50: float | None = None
    length_p99: float | None = None
    rollout_tokens_per_second: float | None = None
    learner_tokens_per_second: float | None = None
    samples_per_second: float | None = None
    age_mean: float | None = None
    age_max: float | None = None
    loss: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    time: Mapping[str, float | None] = field(default_factory=dict)
    dropped: Mapping[str, float | None] = field(default_factory=dict)
    buffer: Mapping[str, float | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the record as one JSON object; numbers that are not finite become null."""
        return {name: plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Self | None:
        """Return the record a line describes, or None where it is not a step."""
        step, seconds = _number(line.get("step")), _number(line.get("seconds"))
        if line.get("phase") not in PHASES or step is None:
            return None
        rest: dict[str, Any] = {name: _number(line.get(name)) for name in STEP_NUMBERS}
        rest |= {name: _numbers(line.get(name)) for name in STEP_MAPPINGS}
        return cls(phase=line["phase"], step=int(step), seconds=seconds or 0.0, **rest)


STEP_MAPPINGS = ("metrics", "time", "dropped", "buffer")
STEP_NUMBERS = tuple(
    name
    for name in StepRecord.__dataclass_fields__
    if name not in ("phase", "step", "seconds", *STEP_MAPPINGS)
)


@dataclass(frozen=True)
class EvaluationRecord:
    """Accuracy on the held-out prompts; ``validation`` is on the warm start's own instead.

    ``sampled`` is accuracy at temperature 1; ``standard_error`` belongs to ``greedy``
    and ``sampled_standard_error`` to ``sampled``.
    """

    label: EvaluationLabel
    step: int
    seconds: float
    greedy: float | None
    sampled: float | None
    num_prompts: int
    standard_error: float | None = None
    sampled_standard_error: float | None = None

    @classmethod
    def measured(
        cls,
        label: EvaluationLabel,
        step: int,
        seconds: float,
        greedy: float,
        sampled: float | None,
        num_prompts: int,
    ) -> Self:
        """Return the record of right-or-wrong accuracies, with their binomial standard errors."""
        return cls(
            label=label,
            step=step,
            seconds=seconds,
            greedy=greedy,
            sampled=sampled,
            num_prompts=num_prompts,
            standard_error=standard_error(greedy, num_prompts),
            sampled_standard_error=(
                None if sampled is None else standard_error(sampled, num_prompts)
            ),
        )

    @property
    def phase(self) -> Phase:
        """The phase whose steps ``step`` counts."""
        return "warm_start" if self.label in WARM_START_LABELS else "train"

    def as_dict(self) -> dict[str, Any]:
        """Return the record as one JSON object."""
        return {"phase": "evaluation", **{name: plain(value) for name, value in vars(self).items()}}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Self | None:
        """Return the record a line describes, or None where it is not an evaluation."""
        if line.get("phase") != "evaluation" or line.get("label") not in EVALUATION_LABELS:
            return None
        return cls(
            label=line["label"],
            step=int(_number(line.get("step")) or 0),
            seconds=_number(line.get("seconds")) or 0.0,
            greedy=_number(line.get("greedy")),
            sampled=_number(line.get("sampled")),
            num_prompts=int(_number(line.get("num_prompts")) or 0),
            standard_error=_number(line.get("standard_error")),
            sampled_standard_error=_number(line.get("sampled_standard_error")),
        )


@dataclass(frozen=True)
class SampleRecord:
    """One rollout that was trained on; ``versions`` sampled it, oldest first.

    ``drafted`` are its tokens that came from drafts, of siblings and of the history; None where
    engines do not draft.
    """

    step: int
    prompt: str
    completion: str
    reward: float
    reference: str | None = None
    versions: tuple[int, ...] = ()
    age: int | None = None
    finish_reason: str = "stop"
    drafted: tuple[int, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as one JSON object."""
        return {name: plain(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Generation:
    """A greedy completion and what the grader gave for it."""

    text: str
    reward: float | None


@dataclass(frozen=True)
class ExampleRecord:
    """One held-out prompt, answered before and after training; None where not (yet) generated."""

    prompt: str
    reference: str | None
    before: Generation | None
    after: Generation | None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as one JSON object."""
        return {
            "prompt": self.prompt,
            "reference": self.reference,
            "before": None if self.before is None else _generation_dict(self.before),
            "after": None if self.after is None else _generation_dict(self.after),
        }

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Self | None:
        """Return the example a JSON object describes, or None where it has no prompt."""
        if not isinstance(line.get("prompt"), str):
            return None
        reference = line.get("reference")
        return cls(
            prompt=line["prompt"],
            reference=None if reference is None else str(reference),
            before=_generation(line.get("before")),
            after=_generation(line.get("after")),
        )


def _generation_dict(generation: Generation) -> dict[str, Any]:
    return {"text": generation.text, "reward": plain(generation.reward)}


def _generation(value: object) -> Generation | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        return None
    return Generation(text=value["text"], reward=_number(value.get("reward")))


def _number(value: object) -> float | None:
    """Return the value where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def _numbers(value: object) -> dict[str, float | None]:
    """Return the numbers of a mapping; an empty one where it is none."""
    if not isinstance(value, Mapping):
        return {}
    return {str(name): _number(entry) for name, entry in value.items()}
