"""Drafters that are right or wrong on purpose, for vLLM's `custom_class`."""

from __future__ import annotations

from collections.abc import Callable

from paceline.controller.verify.drafters import RowDrafter


class ScriptedDrafter(RowDrafter):
    """Drafts what ``script`` makes of all tokens of a row; counts what it drafted."""

    script: Callable[[list[int]], list[int]] = staticmethod(lambda tokens: [])
    num_drafted = 0

    def write(self, rows, contexts):
        drafts = [ScriptedDrafter.script(context.tolist()) for context in contexts]
        ScriptedDrafter.num_drafted += sum(map(len, drafts))
        return drafts
