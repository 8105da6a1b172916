"""A drafter that knows what comes: no drafter can save more steps with drafts of that length.

It replays recorded completions. With coupled sampling what is sampled is fixed by seed and weights,
so that another run's completions are what this one will sample, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.configs.schema.rollout import DraftingConfig

NUM_TOKENS = DraftingConfig().max_tokens
"""What it drafts at a time: as much as ``rollout.drafting`` does at most."""
SPECULATIVE = {
    "method": "custom_class",
    "model": f"{__name__}.ReplayDrafter",
    "num_speculative_tokens": NUM_TOKENS,
}
"""vLLM's settings for it."""


class ReplayDrafter:
    """vLLM builds it and asks for drafts; ``attach`` first, ``foretell`` before every epoch."""

    def __init__(self, vllm_config: Any) -> None:
        self._futures: Mapping[str, NDArray[np.int32]] = {}

    def load_model(self, target_model: Any) -> None:
        """There is none to load."""

    def attach(self, rows_of: Callable[[], Sequence[tuple[str, int]]]) -> None:
        """``rows_of`` says of every row of the batch its sample's name and its prompt's length."""
        self._rows_of = rows_of

    def foretell(self, futures: Mapping[str, NDArray[np.int32]]) -> None:
        """What samples will be, by name: int32 [C] each."""
        self._futures = futures

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """The next tokens of every row that was foretold rightly so far."""
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        for row, (name, num_prompt) in enumerate(self._rows_of()):
            sampled, future = sampled_token_ids[row], self._futures.get(name)
            count = int(num_tokens_no_spec[row]) - num_prompt
            if not sampled or future is None or count > len(future):
                continue
            if future[count - 1] == sampled[-1]:
                drafts[row] = future[count : count + NUM_TOKENS].tolist()
        return drafts
