"""A drafter that knows what comes: no drafter can save more steps with drafts of that length.

It replays recorded completions. With coupled sampling what is sampled is fixed by seed and weights,
so that another run's completions are what this one will sample, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from paceline.configs.schema.rollout import DraftingConfig
from paceline.controller.verify.drafters import RowDrafter

NUM_TOKENS = DraftingConfig().max_tokens
"""What it drafts at a time: as much as ``rollout.drafting`` does at most."""
SPECULATIVE = {
    "method": "custom_class",
    "model": f"{__name__}.ReplayDrafter",
    "num_speculative_tokens": NUM_TOKENS,
}
"""vLLM's settings for it."""


class ReplayDrafter(RowDrafter):
    """Drafter of what was foretold; ``attach`` it first, ``foretell`` before every epoch."""

    def attach(self, rows_of: Callable[[], Sequence[tuple[str, int]]]) -> None:
        """Ask ``rows_of`` for the sample's name and the prompt's length of every row."""
        self._rows_of = rows_of

    def foretell(self, futures: Mapping[str, NDArray[np.int32]]) -> None:
        """Take what samples will be, by name: int32 [C] each."""
        self._futures = futures

    def write(
        self, rows: Sequence[int], contexts: Sequence[NDArray[np.int32]]
    ) -> Sequence[Sequence[int]]:
        """Return the rest of every row that was foretold rightly so far."""
        samples = self._rows_of()
        return [
            self._rest(*samples[row], context) for row, context in zip(rows, contexts, strict=True)
        ]

    def _rest(self, name: str, num_prompt: int, context: NDArray[np.int32]) -> list[int]:
        future, count = self._futures.get(name), len(context) - num_prompt
        if future is None or count > len(future) or future[count - 1] != context[-1]:
            return []
        return future[count : count + NUM_TOKENS].tolist()
