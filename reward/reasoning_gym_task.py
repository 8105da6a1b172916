"""reasoning-gym tasks: one object generates the problems and scores the answers.

reasoning-gym takes seconds to import. So it is imported where a task is first built: in the process
that draws prompts and in those that grade.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from paceline.configs.errors import ConfigError
from paceline.configs.vocabulary import Prompt, Record

# Item i of a task draws from Random(seed + i): neighbouring seeds give the same items, shifted.
_SEED_SPACING = 1_000_003
# Some tasks fix all their items when they are built, so that a large size is slow or refused.
_CHUNK = 1_000


class ReasoningGymTaskSource:
    """Source of one task's problems, by index, without end.

    A record's fields are the task's own metadata (such as ``word``), ``question`` and ``answer``,
    and ``metadata``, which the task's scorer needs. Sources with different ``seed`` share no items
    in their first million.
    """

    num_records: int | None = None

    def __init__(self, task: str, parameters: Mapping[str, Any], seed: int) -> None:
        self._task, self._parameters = task, dict(parameters)
        self._first_seed = seed * _SEED_SPACING
        self._chunk, self._items = 0, self._build(0)

    def record(self, index: int) -> Record:
        """Return the problem with this index, the same at every call."""
        chunk, position = divmod(index, _CHUNK)
        if chunk != self._chunk:
            self._chunk, self._items = chunk, self._build(chunk)
        entry = self._items[position]
        answer = entry["answer"]
        fields = {
            **entry["metadata"],
            "question": entry["question"],
            "metadata": entry["metadata"],
            **({} if answer is None else {"answer": answer}),
        }
        return Record(f"{self._task}:{index}", fields, answer)

    def _build(self, chunk: int) -> Any:
        seed = self._first_seed + chunk * _CHUNK
        return build_task(self._task, self._parameters, seed, _CHUNK)


class ReasoningGymTaskGrader:
    """Reward 1 where the task's own `score_answer` reaches ``threshold``, else 0."""

    def __init__(self, task: str, parameters: Mapping[str, Any], threshold: float) -> None:
        self._task = build_task(task, parameters, seed=0, size=1)
        self._threshold = threshold

    def grade(self, prompt: Prompt, completions: Sequence[str]) -> list[float]:
        """Return rewards 0 or 1 for answers to a problem of :class:`ReasoningGymTaskSource`."""
        entry = {
            "question": prompt.metadata["question"],
            "answer": prompt.reference,
            "metadata": prompt.metadata["metadata"],
        }
        scores = (self._task.score_answer(completion, entry) for completion in completions)
        # Scores lie in [0, 1]. More than 1 is partial credit rounded up: spell_backward adds up 1/9
        # nine times to 1.0000000000000002 for a 9-letter answer with anything behind it.
        return [float(self._threshold <= score <= 1) for score in scores]


def build_task(task: str, parameters: Mapping[str, Any], seed: int, size: int) -> Any:
    """Return the reasoning-gym dataset of ``size`` items from ``seed``.

    Raises:
        ConfigError: there is no such task, or it does not take these parameters.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        matches = get_close_matches(task, list(DATASETS), n=1)
        hint = f"; did you mean {matches[0]}?" if matches else ""
        raise ConfigError(f"data.source.task: reasoning-gym has no task {task!r}{hint}")
    known = {field.name for field in dataclasses.fields(DATASETS[task][1])} - {"seed", "size"}
    if unknown := sorted(set(parameters) - known):
        raise ConfigError(
            f"data.source.parameters: {task} takes no {', '.join(unknown)}; it takes "
            f"{', '.join(sorted(known))} (the seed is data.seed, the size unlimited)"
        )
    try:
        items = reasoning_gym.create_dataset(task, seed=seed, size=size, **parameters)
        items[0]  # some parameters are refused only here, such as lengths that no word has
        return items
    except Exception as error:
        raise ConfigError(
            f"data.source.parameters: {task} refuses {dict(parameters)!r}: "
            f"{' '.join(str(error).split())}"
        ) from error
