"""Everything a report is made of, read from a run's folder; whatever is missing is empty."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import read_json, read_lines
from paceline.controller.observe.files.records import (
    EvaluationRecord,
    ExampleRecord,
    Phase,
    StepRecord,
)
from paceline.controller.observe.files.summary import RunSummary


@dataclass(frozen=True)
class RunData:
    """A run as its files tell it; where no ``summary`` was written, the metrics make one."""

    name: str
    config: Mapping[str, Any]
    config_text: str
    versions: Mapping[str, Any]
    steps: Sequence[StepRecord]
    evaluations: Sequence[EvaluationRecord]
    examples: Sequence[ExampleRecord]
    summary: RunSummary
    has_summary: bool
    num_unreadable: int
    num_discarded: int

    @classmethod
    def read(cls, folder: RunFolder) -> RunData:
        """Read the folder; a torn, partial or foreign file costs its own part and nothing else."""
        lines, num_unreadable = read_lines(folder.metrics)
        steps = _unique([r for r in map(StepRecord.from_dict, lines) if r is not None])
        found = [r for r in map(EvaluationRecord.from_dict, lines) if r is not None]
        evaluations = list({(r.label, r.step): r for r in found}.values())
        text = _text(folder)
        config, versions = _mapping(text), read_json(folder.versions)
        versions = versions if isinstance(versions, dict) else {}
        summary = RunSummary.read(folder)
        return cls(
            name=summary.name if summary else folder.name,
            config=config,
            config_text=text,
            versions=versions,
            steps=steps,
            evaluations=evaluations,
            examples=_examples(folder),
            summary=_with_accuracies(
                summary or _derived(folder.name, config, versions, steps, evaluations), evaluations
            ),
            has_summary=summary is not None,
            num_unreadable=num_unreadable,
            num_discarded=len(read_lines(folder.discarded_metrics)[0]),
        )

    def phase(self, phase: Phase) -> list[StepRecord]:
        """Return the steps of one phase, in order."""
        return [record for record in self.steps if record.phase == phase]

    def median(self, name: str) -> float | None:
        """Return the median of a number over the training steps; None where never measured."""
        values = [getattr(record, name) for record in self.phase("train")]
        measured = [value for value in values if value is not None]
        return statistics.median(measured) if measured else None

    def mean_seconds(self, part: str) -> float | None:
        """Return a training step's mean seconds in a part of it; None where never measured."""
        values = [record.time.get(part) for record in self.phase("train")]
        measured = [value for value in values if value is not None]
        return statistics.fmean(measured) if measured else None


def _unique(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """Return steps in order, each once: a later line of the same step replaces an earlier one."""
    latest = {(record.phase, record.step): record for record in steps}
    return sorted(latest.values(), key=lambda record: (record.phase == "train", record.step))


def _text(folder: RunFolder) -> str:
    if not folder.config.exists():
        return ""
    return folder.config.read_text(encoding="utf-8", errors="replace")


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _examples(folder: RunFolder) -> list[ExampleRecord]:
    content = read_json(folder.examples)
    entries = [entry for entry in content if isinstance(entry, dict)] if content else []
    return [example for example in map(ExampleRecord.from_dict, entries) if example is not None]


def _derived(
    name: str,
    config: Mapping[str, Any],
    versions: Mapping[str, Any],
    steps: Sequence[StepRecord],
    evaluations: Sequence[EvaluationRecord],
) -> RunSummary:
    """Return the outcome, as far as metrics tell, of a run that is still at work or was killed."""
    train = [record for record in steps if record.phase == "train"]
    ages = [record.age_max for record in train if record.age_max is not None]
    seconds = [r.seconds for r in steps] + [r.seconds for r in evaluations]
    num_prompts = [r.num_prompts for r in evaluations if r.label != "validation"]
    loop = config.get("loop")
    return RunSummary(
        name=name,
        status="interrupted",
        seeds={"run": versions["seed"]} if "seed" in versions else {},
        steps=max((record.step for record in train), default=0),
        num_held_out=max(num_prompts, default=0),
        max_lag=int(loop.get("max_lag", 0)) if isinstance(loop, dict) else 0,
        max_age=int(max(ages)) if ages else None,
        wall_seconds={"total": max(seconds, default=0.0)},
        groups={"dropped": dict(_dropped(train))},
        command=str(versions.get("command", "")),
    )


def _dropped(steps: Sequence[StepRecord]) -> Counter[str]:
    dropped: Counter[str] = Counter()
    for record in steps:
        dropped.update({reason: int(n) for reason, n in record.dropped.items() if n})
    return dropped


def _with_accuracies(summary: RunSummary, evaluations: Sequence[EvaluationRecord]) -> RunSummary:
    """Return the summary with the accuracies it lacks: before training, and the last one after."""
    found: dict[str, tuple[float, float | None]] = {}
    for record in evaluations:
        if record.label == "validation":
            continue
        when = "before" if record.phase == "warm_start" or record.step == 0 else "after"
        if record.greedy is not None:
            found[f"greedy_{when}"] = (record.greedy, record.standard_error)
        if record.sampled is not None:
            found[f"sampled_{when}"] = (record.sampled, record.sampled_standard_error)
    lacking = {name: value for name, value in found.items() if getattr(summary, name) is None}
    accuracies: dict[str, Any] = {name: accuracy for name, (accuracy, _) in lacking.items()}
    errors = {name: error for name, (_, error) in lacking.items() if error is not None}
    return replace(summary, **accuracies, standard_errors={**summary.standard_errors, **errors})
