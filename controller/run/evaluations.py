"""A run's evaluations on held-out and validation prompts: recorded, and shown in the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from paceline.configs.vocabulary import Prompt
from paceline.controller.groups.evaluation import Evaluator, accuracy
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.recorder import Recorder
from paceline.controller.observe.files.records import (
    EvaluationLabel,
    EvaluationRecord,
    ExampleRecord,
    Generation,
)
from paceline.controller.run.progress import RunProgress


class RunEvaluations:
    """Evaluates what the engines serve; ``num_examples`` held-out prompts are shown in the report.

    Records are timed from ``started``, by ``time.perf_counter``.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        held_out: Sequence[Prompt],
        num_examples: int,
        folder: RunFolder,
        recorder: Recorder,
        progress: RunProgress,
    ) -> None:
        self._evaluator = evaluator
        self._held_out = held_out
        self._num_examples = num_examples
        self._folder = folder
        self._recorder = recorder
        self._progress = progress
        self._started = progress.began

    async def validate(self, prompts: Sequence[Prompt], step: int) -> float:
        """Return the greedy accuracy on the warm start's validation prompts."""
        found = accuracy(await self._evaluator.greedy(prompts))
        self._record("validation", step, found, None, len(prompts))
        return found

    async def during(self, step: int) -> None:
        """Record the greedy accuracy on held-out prompts after a step of training."""
        with self._progress.spending("evaluation"):
            greedy = accuracy(await self._evaluator.greedy(self._held_out))
        self._record("during", step, greedy, None, len(self._held_out))

    async def before(self) -> None:
        """Evaluate the model that training begins with."""
        self._progress.before = await self._whole("before", 0)
        self._folder.write_examples(self._examples())

    async def after(self, step: int) -> None:
        """Evaluate the trained model."""
        self._progress.after = await self._whole("after", step)
        self._folder.write_examples(self._examples())

    async def _whole(self, label: EvaluationLabel, step: int) -> dict[str, Any]:
        """Return greedy and T=1 accuracy, and example generations for the report."""
        self._recorder.message(f"evaluating {len(self._held_out)} held-out prompts")
        with self._progress.spending("evaluation"):
            greedy = await self._evaluator.greedy(self._held_out)
            sampled = await self._evaluator.sampled(self._held_out)
        self._record(label, step, accuracy(greedy), accuracy(sampled), len(self._held_out))
        return {
            "greedy": accuracy(greedy),
            "sampled": accuracy(sampled),
            "examples": [[t.text, t.reward] for t in greedy[: self._num_examples]],
        }

    def _examples(self) -> list[ExampleRecord]:
        def generation(found: dict[str, Any], index: int) -> Generation | None:
            return Generation(*found["examples"][index]) if found else None

        return [
            ExampleRecord(
                prompt.text,
                prompt.reference,
                generation(self._progress.before, index),
                generation(self._progress.after, index),
            )
            for index, prompt in enumerate(self._held_out[: self._num_examples])
        ]

    def _record(
        self,
        label: EvaluationLabel,
        step: int,
        greedy: float,
        sampled: float | None,
        num_prompts: int,
    ) -> None:
        seconds = time.perf_counter() - self._started
        record = EvaluationRecord.measured(label, step, seconds, greedy, sampled, num_prompts)
        self._recorder.evaluation(record)
