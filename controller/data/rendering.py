"""Prompts and gold completions, rendered from records by the templates of a data source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paceline.configs.errors import ConfigError, DataError
from paceline.configs.schema.data import PromptFormat
from paceline.configs.vocabulary import Prompt, Record
from paceline.controller.data.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Demonstration:
    """A completion that the data source gives: token ids int32 [C], its stop token included."""

    text: str
    token_ids: NDArray[np.int32]


class PromptRenderer:
    """Makes prompts and demonstrations out of records, and refuses those that do not fit.

    ``max_length`` bounds prompt and completion together and ``max_tokens`` the completion, its stop
    token included; all in tokens.
    """

    def __init__(
        self,
        prompt_format: PromptFormat,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        max_tokens: int,
    ) -> None:
        self._format = prompt_format
        self._tokenizer = tokenizer
        self._max_prompt = max_length - max_tokens
        self._max_tokens = max_tokens

    def prompt(self, record: Record) -> Prompt:
        """Render a record.

        Raises:
            ConfigError: `prompt_template` names a field that the record lacks.
            DataError: the prompt is empty, too long, or has characters without a token.
        """
        text = _fill("prompt_template", self._format.prompt_template, record.fields)
        if self._format.chat:
            text = self._as_chat(text)
        # A chat template writes its own special tokens.
        token_ids = encode(self._tokenizer, text, special_tokens=not self._format.chat)
        if not 0 < len(token_ids) <= self._max_prompt:
            raise DataError(
                f"prompt {record.id} has {len(token_ids)} tokens, expected 1 to {self._max_prompt} "
                f"(model.max_length less rollout.sampling.max_tokens); raise model.max_length, or "
                f"leave the record out"
            )
        return Prompt(record.id, text, token_ids, record.reference, record.fields)

    def demonstration(self, prompt: Prompt) -> Demonstration:
        """Return the gold completion.

        Raises:
            ConfigError: `answer_template` names a field that the record lacks.
            DataError: it is longer than `rollout.sampling.max_tokens`.
        """
        return self._completion(prompt, "answer_template")

    def preference(self, prompt: Prompt) -> tuple[Demonstration, Demonstration]:
        """Return the better and the worse completion.

        Raises:
            ConfigError: a template names a field that the record lacks.
            DataError: one is longer than `rollout.sampling.max_tokens`, or both are the same.
        """
        chosen = self._completion(prompt, "chosen_template")
        rejected = self._completion(prompt, "rejected_template")
        if np.array_equal(chosen.token_ids, rejected.token_ids):
            raise DataError(
                f"the chosen and the rejected completion of prompt {prompt.id} are the same: "
                "nothing can be preferred; remove the record"
            )
        return chosen, rejected

    def _completion(self, prompt: Prompt, template: str) -> Demonstration:
        text = _fill(template, getattr(self._format, template), prompt.metadata)
        token_ids = (*encode(self._tokenizer, text, False), self._tokenizer.eos_token_id)
        if len(token_ids) > self._max_tokens:
            raise DataError(
                f"the completion of prompt {prompt.id} by data.source.{template} has "
                f"{len(token_ids)} tokens, its stop token included, more than "
                f"rollout.sampling.max_tokens ({self._max_tokens}); raise that"
            )
        return Demonstration(text, np.array(token_ids, dtype=np.int32))

    def _as_chat(self, text: str) -> str:
        system = self._format.system_prompt
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except ValueError as error:
            raise ConfigError(
                f"data.source.chat: the tokenizer has no chat template it can fill "
                f"({' '.join(str(error).split())[:120]}); set chat to false"
            ) from error
        return str(rendered)


def _fill(key: str, template: str, fields: Mapping[str, Any]) -> str:
    try:
        return template.format_map(fields)
    except KeyError as error:
        raise ConfigError(
            f"data.source.{key}: the records have no field {error.args[0]!r}; "
            f"they have {', '.join(sorted(fields))}"
        ) from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"data.source.{key}: {template!r} is no format string over the record's fields "
            f"({error}); double the braces that are meant literally"
        ) from error
