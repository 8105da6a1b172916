"""The folder a run leaves behind: its configuration, curves, samples and results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.configs.errors import CheckpointError, UserError
from paceline.controller.observe.files.jsonl import (
    JsonLines,
    read_json,
    read_lines,
    write_atomically,
    write_json,
    write_json_lines,
)
from paceline.controller.observe.files.records import (
    PHASES,
    EvaluationRecord,
    ExampleRecord,
    Phase,
    StepRecord,
)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, by name. Constructing it touches nothing; see the class methods."""

    root: Path

    @classmethod
    def create(cls, root: Path) -> RunFolder:
        """Return a new run's folder, made where it is missing.

        Raises ``UserError`` where the path is a file or a folder with something in it.
        """
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is a file, expected a folder for the run: choose another name")
        if root.is_dir() and any(root.iterdir()):
            raise UserError(
                f"{root} already holds a run: choose another name, continue it with --resume, "
                f"or remove the folder"
            )
        root.mkdir(parents=True, exist_ok=True)
        return cls(root)

    @classmethod
    def open(cls, root: Path) -> RunFolder:
        """Return the folder of an existing run, to be resumed or reported.

        Raises ``CheckpointError`` where there is none.
        """
        folder = cls(root)
        if not root.is_dir():
            raise CheckpointError(f"no run at {root}: check its name and output_dir")
        if not folder.config.exists():
            raise CheckpointError(f"{root} has no {folder.config.name}: it is not a run's folder")
        return folder

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.resolve().name

    @property
    def config(self) -> Path:
        """The resolved configuration, YAML."""
        return self.root / "config.yaml"

    @property
    def versions(self) -> Path:
        """Versions, machine, seed and command, JSON."""
        return self.root / "versions.json"

    @property
    def metrics(self) -> Path:
        """One line a step or evaluation, JSON Lines."""
        return self.root / "metrics.jsonl"

    @property
    def discarded_metrics(self) -> Path:
        """Lines of ``metrics`` that an interrupted run had written after its last checkpoint."""
        return self.root / "metrics.discarded.jsonl"

    @property
    def samples(self) -> Path:
        """Rollouts that were trained on, JSON Lines."""
        return self.root / "samples.jsonl"

    @property
    def examples(self) -> Path:
        """Held-out prompts answered before and after training, JSON."""
        return self.root / "examples.json"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files, a folder a phase."""
        return self.root / "tensorboard"

    @property
    def summary(self) -> Path:
        """The run's outcome, JSON."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """The report, one HTML file."""
        return self.root / "report.html"

    @property
    def log(self) -> Path:
        """The log in plain lines; other libraries' output too while a live view is shown."""
        return self.root / "run.log"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints to resume from."""
        return self.root / "checkpoints"

    @property
    def initial(self) -> Path:
        """The model before any training, where the run made it itself."""
        return self.root / "initial"

    @property
    def reference(self) -> Path:
        """The frozen reference policy in Hugging Face format, where the run made it itself."""
        return self.root / "reference"

    @property
    def incidents(self) -> Path:
        """Steps that could not be taken, with what it needs to try them again."""
        return self.root / "incidents"

    @property
    def final(self) -> Path:
        """The trained model in Hugging Face format."""
        return self.root / "final"

    def write_config(self, text: str) -> None:
        """Save the resolved configuration (YAML text)."""
        write_atomically(self.config, text)

    def write_versions(self, versions: Mapping[str, Any]) -> None:
        """Save what the run runs on; a resumed run keeps the first and adds to ``resumed_with``."""
        first = read_json(self.versions)
        if not isinstance(first, dict):
            write_json(self.versions, dict(versions))
            return
        later = first.get("resumed_with", [])
        write_json(self.versions, {**first, "resumed_with": [*later, dict(versions)]})

    def write_examples(self, examples: Sequence[ExampleRecord]) -> None:
        """Save the held-out examples; call again when there are answers of after training."""
        write_json(self.examples, [example.as_dict() for example in examples])

    def rewind(self, phase: Phase, step: int) -> float:
        """Forget what was recorded after the given step, which a run is about to continue from.

        Later lines of ``metrics.jsonl`` move to ``metrics.discarded.jsonl``, later samples to
        ``samples.discarded.jsonl``: curves hold every step once. Returns the ``seconds`` of the
        last line that stays (0.0 where none does), which the resumed run's clock continues.
        """
        last_seconds = 0.0
        for line in _cut(self.metrics, lambda line: _is_later(line, phase, step)):
            last_seconds = max(last_seconds, float(line.get("seconds") or 0.0))
        sample_step = step if phase == "train" else 0
        _cut(self.samples, lambda line: _step(line) > sample_step)
        return last_seconds


def _cut(path: Path, is_later: Callable[[Mapping[str, Any]], bool]) -> Sequence[Mapping[str, Any]]:
    """Move the later lines of a file into ``….discarded.jsonl``; returns the lines kept."""
    lines, num_unreadable = read_lines(path)
    kept = [line for line in lines if not is_later(line)]
    later = [line for line in lines if is_later(line)]
    if later:
        with JsonLines(path.with_suffix(".discarded.jsonl")) as discarded:
            for line in later:
                discarded.append(line)
    if later or num_unreadable:
        write_json_lines(path, kept)
    return kept


def _is_later(line: Mapping[str, Any], phase: Phase, step: int) -> bool:
    """Return whether a metrics line lies after a step of a phase; the warm start comes first."""
    record = StepRecord.from_dict(line) or EvaluationRecord.from_dict(line)
    if record is None:
        return False
    return (PHASES.index(record.phase), record.step) > (PHASES.index(phase), step)


def _step(line: Mapping[str, Any]) -> int:
    step = line.get("step")
    return step if isinstance(step, int) else 0
