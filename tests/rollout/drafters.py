"""Drafters that are right or wrong on purpose, for vLLM's `custom_class`."""

from __future__ import annotations

from collections.abc import Callable


class FixedDrafter:
    """Always drafts ``tokens``, whatever came before, and counts what it drafted."""

    tokens: list[int] = []
    num_drafted = 0

    def __init__(self, vllm_config) -> None:
        self._max = vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, target_model) -> None:
        """There is none."""

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=None):
        drafts = [FixedDrafter.tokens[: self._max] if new else [] for new in sampled_token_ids]
        FixedDrafter.num_drafted += sum(map(len, drafts))
        return drafts


class ScriptedDrafter(FixedDrafter):
    """Drafts what ``script`` makes of all tokens of a row; counts what it drafted."""

    script: Callable[[list[int]], list[int]] = staticmethod(lambda tokens: [])
    num_drafted = 0

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=None):
        drafts = [
            ScriptedDrafter.script(token_ids_cpu[row, : num_tokens_no_spec[row]].tolist())
            if new
            else []
            for row, new in enumerate(sampled_token_ids)
        ]
        ScriptedDrafter.num_drafted += sum(map(len, drafts))
        return [draft[: self._max] for draft in drafts]
