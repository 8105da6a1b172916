"""The prompts of a run, split so that what is evaluated on is never trained on.

Held-out prompts are drawn first, then validation prompts, then training prompts without end. What
is kept apart is the *text* of a prompt: a generated task repeats its problems, and a dataset may
hold a question twice.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from paceline.configs.errors import CheckpointError, DataError
from paceline.configs.schema.data import CurriculumConfig
from paceline.configs.vocabulary import Prompt
from paceline.controller.data.curriculum import Curriculum, GroupOutcome, require_fitting
from paceline.controller.data.rendering import Demonstration, PromptRenderer
from paceline.controller.data.sources import PromptSource

# An endless source that shows nothing new for so long is taken to have nothing new.
_PATIENCE = 10_000


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
        """Return a new feed of training prompts, at their beginning; no outcome is known to it."""
        chosen = self._curriculum
        return PromptFeed(
            self._source,
            self._renderer,
            self._kept_apart,
            self._first_training_index,
            None if chosen is None else Curriculum(chosen, self._seed),
        )

    def demonstration(self, prompt: Prompt) -> tuple[Demonstration]:
        """Return the prompt's gold completion; see `PromptRenderer`."""
        return (self._renderer.demonstration(prompt),)

    def preference(self, prompt: Prompt) -> tuple[Demonstration, Demonstration]:
        """Return its better and its worse completion; see `PromptRenderer`."""
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
        """Return the next training prompt and its position.

        Raises:
            DataError: no prompt is left besides those kept apart, or one cannot be rendered.
        """
        for num_passed in itertools.count():
            position, prompt = self._next_not_kept_apart()
            if self._curriculum is None or self._curriculum.admits(position, prompt, num_passed):
                break
        return position, prompt

    def observe(self, outcomes: Iterable[GroupOutcome]) -> dict[str, float]:
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
        """Return what a checkpoint keeps, in plain values."""
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

    def skip_to(self, position: int) -> None:
        """Go on at a position: those before it are trained, or in the hands of the loop."""
        self.position = position

    def at(self, position: int) -> Prompt:
        """Return the prompt at a position, drawn before or not."""
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
    """Return how many indices may hold nothing new: a whole epoch lies in any two."""
    return _PATIENCE if source.num_records is None else 2 * source.num_records


def _fingerprint(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in sorted(texts):
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
