"""Job and answer of the peer's process: two JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paceline.controller.bench.e2e.workload import Workload


@dataclass(frozen=True)
class Problem:
    """A prompt as the model sees it and the one completion that is rewarded."""

    prompt: str
    reference: str


@dataclass(frozen=True)
class TRLJob:
    """A run of TRL's GRPOTrainer; ``problems`` are trained on in this order.

    ``answer_file`` receives ``{"steps": [...], "versions": {...}}``.
    """

    model: str
    problems: Sequence[Problem]
    num_steps: int
    groups_per_step: int
    samples_per_group: int
    microbatch_size: int
    max_tokens: int
    temperature: float
    learning_rate: float
    adam_betas: tuple[float, float]
    max_grad_norm: float
    clip_low: float
    clip_high: float
    seed: int
    answer_file: str

    @classmethod
    def of(
        cls,
        workload: Workload,
        model: Path,
        problems: Sequence[Problem],
        num_steps: int,
        answer_file: Path,
    ) -> TRLJob:
        """Return a job with the settings that ``workload`` gives both sides."""
        return cls(
            model=str(model),
            problems=tuple(problems),
            num_steps=num_steps,
            groups_per_step=workload.groups_per_step,
            samples_per_group=workload.samples_per_group,
            microbatch_size=min(workload.peer_microbatch_size, workload.samples_per_step),
            max_tokens=workload.max_tokens,
            temperature=workload.temperature,
            learning_rate=workload.learning_rate,
            adam_betas=workload.adam_betas,
            max_grad_norm=workload.max_grad_norm,
            clip_low=workload.clip_low,
            clip_high=workload.clip_high,
            seed=workload.seed,
            answer_file=str(answer_file),
        )

    def write(self, file: Path) -> None:
        """Save as JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> TRLJob:
        """Read what ``write`` saved."""
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        problems = tuple(Problem(**problem) for problem in values.pop("problems"))
        betas = tuple(values.pop("adam_betas"))
        return cls(problems=problems, adam_betas=betas, **values)
