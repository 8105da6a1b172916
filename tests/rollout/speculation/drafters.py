"""Drafters that are right or wrong on purpose, for vLLM's `custom_class`."""

from __future__ import annotations

from collections.abc import Callable


class ScriptedDrafter:
    """Drafts what ``script`` makes of all tokens of a row; counts what it drafted."""

    script: Callable[[list[int]], list[int]] = staticmethod(lambda tokens: [])
    num_drafted = 0

    def __init__(self, vllm_config) -> None:
        self._max = vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, target_model) -> None:
        """There is none."""

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=None):
        drafts = [
            ScriptedDrafter.script(token_ids_cpu[row, : num_tokens_no_spec[row]].tolist())
            if new
            else []
            for row, new in enumerate(sampled_token_ids)
        ]
        ScriptedDrafter.num_drafted += sum(map(len, drafts))
        return [draft[: self._max] for draft in drafts]
