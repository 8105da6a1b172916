"""Grading by comparison with the reference."""

from __future__ import annotations

import re
from collections.abc import Sequence

from paceline.configs.errors import ConfigError, DataError
from paceline.configs.vocabulary import Prompt


class ExactAnswerGrader:
    """Reward 1 where the answer equals the prompt's reference, surrounding white space aside.

    The answer is the first group of ``pattern``'s first match in the completion, the whole match
    where it has no group, and the whole completion where ``pattern`` is None.
    """

    def __init__(self, pattern: str | None = None, ignore_case: bool = False) -> None:
        try:
            self._pattern = None if pattern is None else re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"reward.pattern: not a regular expression: {pattern!r} ({error})"
            ) from error
        self._ignore_case = ignore_case

    def grade(self, prompt: Prompt, completions: Sequence[str]) -> list[float]:
        """Return rewards 0 or 1.

        Raises:
            DataError: the prompt has no reference.
        """
        reference = require_reference(prompt, "exact")
        expected = self._normalise(reference)
        return [float(self._answer(completion) == expected) for completion in completions]

    def _answer(self, completion: str) -> str | None:
        if self._pattern is None:
            return self._normalise(completion)
        match = self._pattern.search(completion)
        if match is None:
            return None
        answer = match[1] if self._pattern.groups else match[0]
        return None if answer is None else self._normalise(answer)

    def _normalise(self, text: str) -> str:
        stripped = text.strip()
        return stripped.casefold() if self._ignore_case else stripped


def require_reference(prompt: Prompt, grader: str) -> str:
    """Return the prompt's reference; ``grader`` is the `reward.type` that needs it, for the error.

    Raises:
        DataError: there is none.
    """
    if prompt.reference is None:
        raise DataError(
            f"prompt {prompt.id} has no reference answer, and reward.type {grader} needs one; "
            f"set data.source.answer_field, or use another reward.type"
        )
    return prompt.reference
