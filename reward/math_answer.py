"""Grading mathematical answers by their value, with math-verify."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from paceline.configs.errors import DataError
from paceline.configs.vocabulary import Prompt
from paceline.reward.exact import require_reference


class MathAnswerGrader:
    r"""Reward 1 where math-verify finds the completion's final answer equal to the reference.

    In completions the last LaTeX expression (``\boxed`` first) or plain number is the answer. A
    reference may be either, with or without dollar signs.
    """

    def __init__(self) -> None:
        # math-verify limits its time with signals, which work in a main thread only. They are
        # switched off, since the pool kills a grader that hangs; it warns of that at every call.
        import math_verify

        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._math_verify = math_verify

    def grade(self, prompt: Prompt, completions: Sequence[str]) -> list[float]:
        """Return rewards 0 or 1; a completion without a recognisable answer gets 0.

        Raises:
            DataError: the prompt's reference is missing or holds no expression.
        """
        gold = self._parse_reference(require_reference(prompt, "math"), prompt)
        return [float(self._equal(gold, completion)) for completion in completions]

    def _parse_reference(self, reference: str, prompt: Prompt) -> list[Any]:
        # Without dollar signs math-verify sees plain numbers but no LaTeX, so both are tried.
        for text in (f"${reference}$", reference):
            if gold := self._parse(text):
                return gold
        raise DataError(
            f"the reference of prompt {prompt.id} is no mathematical expression: {reference!r}; "
            f"correct data.source.answer_pattern, or use reward.type exact"
        )

    def _equal(self, gold: list[Any], completion: str) -> bool:
        answer = self._parse(completion)
        return bool(answer and self._math_verify.verify(gold, answer, timeout_seconds=None))

    def _parse(self, text: str) -> list[Any]:
        return list(self._math_verify.parse(text, parsing_timeout=None))
