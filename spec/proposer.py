"""What vLLM asks for drafts: its ``custom_class`` proposer, without importing vLLM.

Rollouts of one prompt repeat each other. What samples of a prompt said before, finished ones of the
same group first of all, is kept for each prompt, and the longest match of a sample's end proposes
what followed it there. A draft only saves steps: what is sampled stays the verifier's business.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.spec.suffix import SuffixDrafter

CONTEXT_TOKENS = 64
"""How far back a match may reach: longer ones are not better guesses."""

RowsOf = Callable[[], Sequence[tuple[str, Hashable]]]
"""Of every row of the engine's batch, in its order: the request's id and its prompt."""


@dataclass
class DraftCounters:
    """Running totals: rows that got a draft, tokens drafted, and drafted tokens accepted."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


class SuffixProposer:
    """Drafts from earlier samples of the same prompt, where the batch is small enough.

    vLLM builds it with its configuration (of which only ``num_speculative_tokens`` is read) and
    calls ``load_model`` and ``propose``; the engine calls ``attach`` before the first step, and
    ``learn`` with what was sampled. All on the engine's thread.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._max_tokens = int(vllm_config.speculative_config.num_speculative_tokens)
        self._histories: OrderedDict[Hashable, SuffixDrafter] = OrderedDict()
        self._drafted: dict[str, int] = {}
        self.counters = DraftCounters()

    def load_model(self, target_model: Any) -> None:
        """There is none to load."""

    def attach(self, rows_of: RowsOf, max_sequences: int, max_prompts: int) -> None:
        """Say whose rows the batch has; draft only while they are at most ``max_sequences``.

        ``max_prompts`` are remembered; the one that was neither drafted for nor learned of the
        longest is forgotten.
        """
        self._rows_of = rows_of
        self._max_sequences = max_sequences
        self._max_prompts = max_prompts

    def learn(self, prompt: Hashable, token_ids: NDArray[np.int32]) -> None:
        """Remember a whole sample of a prompt: its completion's tokens."""
        history = self._histories.setdefault(prompt, SuffixDrafter())
        self._histories.move_to_end(prompt)
        history.add(token_ids)
        if len(self._histories) > self._max_prompts:
            self._histories.popitem(last=False)

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """A draft of at most ``num_speculative_tokens`` for every row; ``[]`` is none.

        ``sampled_token_ids`` are what each row was just given (nothing while it reads its prompt),
        ``token_ids_cpu`` [rows, L] all tokens of each, the first ``num_tokens_no_spec`` of them.
        """
        rows = self._rows_of()
        assert len(rows) == len(sampled_token_ids), "a row of the batch has no request"
        self._count_accepted(rows, sampled_token_ids)
        if sum(map(bool, sampled_token_ids)) > self._max_sequences:
            return [[] for _ in rows]
        drafts = [
            self._draft(prompt, token_ids_cpu[row, : num_tokens_no_spec[row]]) if sampled else []
            for row, ((_, prompt), sampled) in enumerate(zip(rows, sampled_token_ids, strict=True))
        ]
        for (request_id, _), draft in zip(rows, drafts, strict=True):
            if draft:
                self._drafted[request_id] = len(draft)
                self.counters.num_rounds += 1
                self.counters.num_drafted += len(draft)
        return drafts

    def _draft(self, prompt: Hashable, tokens: NDArray[np.int32]) -> list[int]:
        history = self._histories.get(prompt)
        if history is None:
            return []
        self._histories.move_to_end(prompt)
        context = np.ascontiguousarray(tokens[-CONTEXT_TOKENS:], dtype=np.int32)
        # vLLM does not cut what is longer than it asked for, and ends
        return history.propose(context, self._max_tokens)[: self._max_tokens]

    def _count_accepted(
        self,
        rows: Sequence[tuple[str, Hashable]],
        sampled_token_ids: Sequence[Sequence[int]],
    ) -> None:
        """A request that got several tokens at once accepted all of them but the last."""
        for (request_id, _), sampled in zip(rows, sampled_token_ids, strict=True):
            if sampled and self._drafted.pop(request_id, 0):
                self.counters.num_accepted += len(sampled) - 1
        self._drafted.clear()
