"""The sequences that a model reads: every completion of a batch behind its prompt (numpy only)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.configs.vocabulary import Group


@dataclass(frozen=True)
class TokenSequence:
    """A prompt of P tokens and one completion of C tokens: the completion is trained or looked at.

    ``prompt`` numbers the batch's prompts: sequences with the same one begin alike.
    ``token_ids`` int32 [P + C]; ``routed_experts`` int16 [P + C, layers, K] are there where routers
    are to choose as the engine's did (see ``Completion``).
    """

    prompt: int
    num_prompt: int
    token_ids: NDArray[np.int32]
    routed_experts: NDArray[np.int16] | None = None

    @property
    def num_completion(self) -> int:
        """Tokens of the completion, C."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_read(self) -> int:
        """Tokens that a model reads to predict the completion: all but the last; 0 without one."""
        return len(self.token_ids) - 1 if self.num_completion else 0


def token_sequences(groups: Iterable[Group]) -> list[TokenSequence]:
    """Return a sequence for each sample, group by group."""
    sequences = []
    numbers: dict[tuple[int, ...], int] = {}
    for group in groups:
        # a data set's prompts may repeat within a batch
        number = numbers.setdefault(group.prompt.token_ids, len(numbers))
        prompt = np.asarray(group.prompt.token_ids, dtype=np.int32)
        for completion in (sample.completion for sample in group.samples):
            token_ids = np.concatenate([prompt, completion.token_ids])
            sequences.append(
                TokenSequence(number, len(prompt), token_ids, completion.routed_experts)
            )
    return sequences
