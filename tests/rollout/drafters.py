"""Drafters that are right or wrong on purpose, for vLLM's `custom_class`."""

from __future__ import annotations


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
