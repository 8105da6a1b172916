"""Preference pairs for the quick start's task: a word spelt backward, and nearly so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from paceline.configs.vocabulary import Record
from paceline.reward.reasoning_gym_task import ReasoningGymTaskSource


class SpellingPairs:
    """``spell_backward`` with a ``chosen`` answer, the right one, and a ``rejected`` one.

    The latter has two different neighbouring letters swapped, or its last letter doubled where
    there are none. A prompt source for ``data.source.type: import``.
    """

    num_records: int | None = None

    def __init__(self, parameters: Mapping[str, Any], seed: int = 0) -> None:
        self._source = ReasoningGymTaskSource("spell_backward", parameters, seed)
        self._seed = seed

    def record(self, index: int) -> Record:
        """Return the problem of this index with both answers."""
        record = self._source.record(index)
        answer = str(record.reference)
        random = np.random.default_rng([self._seed, index])
        fields = {**record.fields, "chosen": answer, "rejected": misspelt(answer, random)}
        return Record(record.id, fields, record.reference)


def misspelt(answer: str, random: np.random.Generator) -> str:
    """Return a wrong spelling of ``answer``, by one swap or one doubled letter."""
    places = [i for i in range(len(answer) - 1) if answer[i] != answer[i + 1]]
    if not places:
        return answer + answer[-1]
    place = int(random.choice(places))
    return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]
