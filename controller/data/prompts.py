"""Prompts: rendered from records, split so that what is evaluated on is never trained on.

Held-out prompts are drawn first, then validation prompts, then training prompts without end. What
is kept apart is the *text* of a prompt: a generated task repeats its problems, and a dataset may
hold a question twice.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paceline.configs.errors import CheckpointError, ConfigError, DataError
from paceline.configs.schema.data import CurriculumConfig, PromptFormat
from paceline.configs.vocabulary import Prompt, Record
from paceline.controller.data.curriculum import Curriculum, Outcome, require_fitting
from paceline.controller.data.sources import PromptSource
from paceline.controller.data.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An endless source that shows nothing new for so long is taken to have nothing new.
_PATIENCE = 10_000


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
        """The gold completion.

        Raises:
            ConfigError: `answer_template` names a field that the record lacks.
            DataError: it is longer than `rollout.sampling.max_tokens`.
        """
        return self._completion(prompt, "answer_template")

    def preference(self, prompt: Prompt) -> tuple[Demonstration, Demonstration]:
        """The better and the worse completion.

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


class PromptSet:
    """The prompts of a run: held out, for validation, and for training."""

    def __init__(
        self,
        source: PromptSource,
        renderer: PromptRenderer,
        num_held_out: int,
        num_validation: int = 0,
        held_out_source: PromptSource | None = None,
        curriculum: CurriculumConfig | None = None,
        seed: int = 0,
    ) -> None:
        """Draw the held-out and validation prompts, all of different text.

        Held-out prompts come from ``held_out_source``, or from the beginning of ``source``.
        ``curriculum`` chooses among training prompts; ``seed`` is that of its coins.

        Raises:
            DataError: there are too few different prompts, or one cannot be rendered.
            ConfigError: a template or the curriculum does not fit the records.
        """
        self._source = source
        self._renderer = renderer
        taken: set[str] = set()
        first = _draw(held_out_source or source, 0, num_held_out, taken, renderer, "num_held_out")
        start = first.next_index if held_out_source is None else 0
        second = _draw(source, start, num_validation, taken, renderer, "num_validation")
        self.held_out = first.prompts
        self.validation = second.prompts
        self._kept_apart = frozenset(taken)
        self._first_training_index = second.next_index
        self._curriculum, self._seed = curriculum, seed
        if curriculum is not None:
            fields = source.record(self._first_training_index).fields
            require_fitting(curriculum, source.num_records, fields)

    def feed(self) -> PromptFeed:
        """A new feed of training prompts, at their beginning; no outcome is known to it."""
        chosen = self._curriculum
        return PromptFeed(
            self._source,
            self._renderer,
            self._kept_apart,
            self._first_training_index,
            None if chosen is None else Curriculum(chosen, self._seed),
        )

    def demonstration(self, prompt: Prompt) -> tuple[Demonstration]:
        """The prompt's gold completion; see `PromptRenderer`."""
        return (self._renderer.demonstration(prompt),)

    def preference(self, prompt: Prompt) -> tuple[Demonstration, Demonstration]:
        """Its better and its worse completion; see `PromptRenderer`."""
        return self._renderer.preference(prompt)


class PromptFeed(Iterator[tuple[int, Prompt]]):
    """Training prompts without end, each with its position: its index in the source.

    Positions grow, with gaps where a prompt is kept apart or ``curriculum`` passes it over.
    ``position`` is the one looked at next: a feed restored to another's state yields what that one
    would have yielded, once it is told the same outcomes.
    """

    def __init__(
        self,
        source: PromptSource,
        renderer: PromptRenderer,
        kept_apart: frozenset[str],
        position: int,
        curriculum: Curriculum | None = None,
    ) -> None:
        self._source = source
        self._renderer = renderer
        self._kept_apart = kept_apart
        self._fingerprint = _fingerprint(kept_apart)
        self._curriculum = curriculum
        self.position = position

    def __next__(self) -> tuple[int, Prompt]:
        """The next training prompt and its position.

        Raises:
            DataError: no prompt is left besides those kept apart, or one cannot be rendered.
        """
        for num_passed in itertools.count():
            position, prompt = self._next_not_kept_apart()
            if self._curriculum is None or self._curriculum.admits(position, prompt, num_passed):
                break
        return position, prompt

    def observe(self, outcomes: Iterable[Outcome]) -> dict[str, float]:
        """Tell the curriculum how groups went; its metrics, of which there are none without one."""
        if self._curriculum is None:
            return {}
        self._curriculum.observe(outcomes)
        return self._curriculum.read_and_reset()

    def _next_not_kept_apart(self) -> tuple[int, Prompt]:
        for _ in range(_patience(self._source)):
            position, prompt = self.position, self.at(self.position)
            self.position += 1
            if prompt.text not in self._kept_apart:
                return position, prompt
        raise DataError(
            f"every prompt is held out or used for validation ({len(self._kept_apart)} are); "
            f"lower data.num_held_out or give more data"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in plain values."""
        state: dict[str, Any] = {"position": self.position, "kept_apart": self._fingerprint}
        if self._curriculum is not None:
            state["curriculum"] = self._curriculum.state()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            CheckpointError: other prompts were kept apart then, so that training might meet them.
        """
        if state["kept_apart"] != self._fingerprint:
            raise CheckpointError(
                "the held-out and validation prompts differ from those of the checkpoint: the data "
                "or its settings changed; resume with the same data, or start a new run"
            )
        self.position = int(state["position"])
        if self._curriculum is not None:
            self._curriculum.restore(state.get("curriculum", ()))

    def at(self, position: int) -> Prompt:
        """The prompt at a position, drawn before or not."""
        return self._renderer.prompt(self._source.record(position))


@dataclass(frozen=True)
class _Drawn:
    prompts: tuple[Prompt, ...]
    next_index: int


def _draw(
    source: PromptSource,
    start: int,
    count: int,
    taken: set[str],
    renderer: PromptRenderer,
    wanted_by: str,
) -> _Drawn:
    """Take ``count`` prompts whose texts are not in ``taken``, and add them there."""
    prompts: list[Prompt] = []
    patience = _patience(source)
    index = last_new = start
    while len(prompts) < count:
        if index - last_new >= patience:
            raise DataError(
                f"{wanted_by} asks for {count} different prompts, found {len(prompts)}; "
                f"lower it or give more data"
            )
        prompt = renderer.prompt(source.record(index))
        index += 1
        if prompt.text not in taken:
            taken.add(prompt.text)
            prompts.append(prompt)
            last_new = index
    return _Drawn(tuple(prompts), index)


def _patience(source: PromptSource) -> int:
    """Indices without anything new after which there is nothing: a whole epoch lies in any two."""
    return _PATIENCE if source.num_records is None else 2 * source.num_records


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


def _fingerprint(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in sorted(texts):
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
