"""What vLLM asks for drafts: its ``custom_class`` proposer, without importing vLLM.

Samples of one prompt repeat each other. What they said is kept by prompt and weight version
(``history.py``): those of older versions, and those being sampled now, token by token as they come.
The longest match of a sample's end proposes what followed it there, and the budget (``planner.py``)
cuts that to what pays. A draft only saves steps: what is sampled is the verifier's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.configs.schema.rollout import DraftingConfig
from paceline.configs.vocabulary import DRAFTED_FROM_HISTORY, DRAFTED_FROM_SIBLINGS, Trace
from paceline.spec.budget import within_batch
from paceline.spec.draft_counters import DraftCounters
from paceline.spec.history import Drafts, History
from paceline.spec.planner import DraftPlanner, Running, Verified
from paceline.spec.traces import OVERLAP_TOKENS, problem_name

Integers = NDArray[np.int64]

MAX_MATCH = 32
"""How far back a match may reach: longer ones are not better guesses."""


@dataclass(frozen=True)
class DraftRequest:
    """A sample that begins or continues: ``num_context`` tokens of its row are there already.

    ``max_tokens`` are the most tokens its row may get beyond them in this turn. ``coupled_seed`` is
    the seed of its noise under coupled sampling, and under the ratio rule None: a draft that knew
    the verifier's random numbers would bias it.
    """

    prompt_token_ids: tuple[int, ...]
    num_context: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    coupled_seed: int | None = None


@dataclass(slots=True)
class _Live:
    """A sample the engine works on. ``num_read`` tokens of its row were read; the generation is
    that of its open sequence in the history, None where none is open."""

    name: str
    problem: str
    request: DraftRequest
    reader_id: int
    num_read: int
    generation: int | None = None
    is_decoding: bool = False
    planned: Running | None = None
    row: int = 0
    num_drafted: int = 0
    from_siblings: bool = False
    accepted: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def limit(self) -> int:
        """The most tokens its row may have."""
        return self.request.num_context + self.request.max_tokens


class SuffixProposer:
    """Drafts from other samples of the same prompt, as far as that pays.

    vLLM builds it with its configuration and calls ``load_model`` and ``propose``; its owner calls
    ``attach`` before the first step, ``begin`` and ``finish`` for every sample, ``step_took`` after
    every step and ``serve`` between two when weights change. All on the engine's thread; ``learn``
    on any.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._max_tokens = int(vllm_config.speculative_config.num_speculative_tokens)
        scheduling = vllm_config.scheduler_config
        # Every request's own token comes first: drafts must not keep any of them from its step.
        self._batch_limit = scheduling.max_num_batched_tokens - scheduling.max_num_seqs
        self._live: dict[str, _Live] = {}
        self._generation = -1
        self._drafts: Drafts | None = None
        self._verified: Verified | None = None
        self._only_decoded = False
        self._totals = DraftCounters()

    def load_model(self, target_model: Any) -> None:
        """There is none to load."""

    def attach(self, settings: DraftingConfig, rows_of: Callable[[], Sequence[str]]) -> None:
        """``rows_of`` says whose rows the engine's batch has, in its order."""
        self._rows_of = rows_of
        self.history = History(settings.window, settings.max_memory_mb << 20)
        self._reader = self.history.reader(max_match=MAX_MATCH)
        self._planner = None
        if settings.budget != "none":
            objective = settings.budget or "makespan"
            self._planner = DraftPlanner(self._max_tokens, objective, self._batch_limit)

    def begin(self, name: str, request: DraftRequest) -> None:
        """A sample was queued under this name."""
        problem = problem_name(request.prompt_token_ids)
        num_read = max(0, request.num_context - MAX_MATCH)
        reader_id = self._reader.open(problem, request.coupled_seed, num_read)
        self._live[name] = _Live(name, problem, request, reader_id, num_read)

    def finish(self, name: str, num_tokens: int, by_itself: bool) -> NDArray[np.uint8]:
        """A sample got ``num_tokens`` in its turn, which ended ``by_itself`` or was cut off.

        Returns:
            Of each of them where it was drafted from, uint8 [num_tokens]: 0 for none.
        """
        live = self._live.pop(name)
        self._reader.close(live.reader_id)
        self._close_sequence(live)
        if self._planner is not None:
            length = live.request.num_context - live.num_prompt + num_tokens
            self._planner.finish(live.problem, length, by_itself)
        sources = np.zeros(num_tokens, dtype=np.uint8)
        for start, count, source in live.accepted:
            sources[start : start + count] = source
        return sources

    def serve(self, version: int) -> None:
        """From the next step on weights of this version sample."""
        self._generation = version
        for live in self._live.values():
            self._close_sequence(live)
            live.is_decoding, live.planned = False, None
        if self._planner is not None:
            self._planner.weights_changed()

    def learn(self, traces: Sequence[Trace]) -> None:
        """Remember what was sampled elsewhere."""
        for trace in traces:
            problem = problem_name(trace.prompt_token_ids)
            self.history.add(problem, trace.version, trace.token_ids)

    def step_took(self, seconds: float) -> None:
        """The engine made a step, proposing included; its costs are learned from that."""
        verified, self._verified = self._verified, None
        if verified is None:
            return
        self._totals.num_draft_steps += 1
        drafting = bool(verified.drafted.any())
        self._totals.num_drafting_steps += drafting
        if self._planner is None:
            return
        if drafting and self._only_decoded:
            self._totals.seconds_drafting_steps += seconds
            self._totals.seconds_without_drafts += self._planner.seconds_without(verified)
        self._planner.observe(verified, seconds if self._only_decoded else None)

    @property
    def counters(self) -> DraftCounters:
        """Running totals."""
        self._totals.drafter_bytes = self.history.memory_bytes
        return self._totals

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
        started = time.perf_counter()
        names = self._rows_of()
        assert len(names) == len(sampled_token_ids), "a row of the batch has no request"
        rows = [
            (row, live)
            for row, name in enumerate(names)
            if sampled_token_ids[row] and (live := self._live.get(name)) is not None
        ]
        self._only_decoded = len(rows) == len(names) and all(live.is_decoding for _, live in rows)
        self._verified = self._verify(rows, sampled_token_ids)
        growing, texts = self._read(rows, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        proposed: list[list[int]] = [[] for _ in names]
        if growing:
            lives = [live for _, live in growing]
            drafts = self._reader.propose(
                [live.reader_id for live in lives], texts, self._most(lives)
            )
            allowed = self._plan(lives, drafts, max(0, len(self._live) - len(names)))
            for index in np.flatnonzero(allowed).tolist():
                proposed[growing[index][0]] = drafts.tokens[index, : allowed[index]].tolist()
        self._totals.seconds_proposing += time.perf_counter() - started
        return proposed

    def _verify(
        self, rows: Sequence[tuple[int, _Live]], sampled_token_ids: Sequence[Sequence[int]]
    ) -> Verified | None:
        """What became of the drafts: whatever a row got beyond one token it had accepted."""
        checked = [(live, len(sampled_token_ids[row]) - 1) for row, live in rows if live.planned]
        for row, live in rows:
            if live.num_drafted:
                count = len(sampled_token_ids[row]) - 1
                source = DRAFTED_FROM_SIBLINGS if live.from_siblings else DRAFTED_FROM_HISTORY
                start = live.num_read - live.request.num_context
                live.accepted.append((start, count, source))
                self._totals.count_accepted(count, live.from_siblings)
        if self._drafts is None or not checked:
            return None
        return Verified(
            running=[live.planned for live, _ in checked if live.planned is not None],
            drafts=self._drafts,
            rows=np.array([live.row for live, _ in checked], dtype=np.int64),
            drafted=np.array([live.num_drafted for live, _ in checked], dtype=np.int64),
            accepted=np.array([count for _, count in checked], dtype=np.int64),
        )

    def _read(
        self,
        rows: Sequence[tuple[int, _Live]],
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
    ) -> tuple[list[tuple[int, _Live]], list[NDArray[np.int32]]]:
        """Learn what each row got; those that go on, and their new text."""
        growing, texts = [], []
        for row, live in rows:
            sampled, end = sampled_token_ids[row], int(num_tokens[row])
            stops = live.request.stop_token_ids
            stop = next((i for i, token in enumerate(sampled) if token in stops), None)
            if stop is not None:  # what was accepted after it is not part of the sample
                end -= len(sampled) - 1 - stop
            end = min(end, live.limit)
            text = token_ids[row, live.num_read : end].copy()
            self._extend(live, token_ids[row], end, len(sampled))
            live.num_read, live.is_decoding, live.planned, live.num_drafted = end, True, None, 0
            if stop is None and end < live.limit:
                growing.append((row, live))
                texts.append(text)
        return growing, texts

    def _extend(self, live: _Live, tokens: NDArray[np.int32], end: int, num_sampled: int) -> None:
        begin = live.num_read
        if live.generation is None:
            live.generation = self._generation
            begin = max(0, end - num_sampled - OVERLAP_TOKENS)
        self.history.extend(live.problem, live.generation, live.name, tokens[begin:end])

    def _close_sequence(self, live: _Live) -> None:
        if live.generation is not None:
            self.history.end_sequence(live.problem, live.generation, live.name)
            live.generation = None

    def _most(self, lives: Sequence[_Live]) -> NDArray[np.int32]:
        """Tokens that would all be sampled if all were accepted, [m]; one comes without a draft."""
        left = [live.limit - live.num_read - 1 for live in lives]
        return np.minimum(np.array(left, dtype=np.int32), self._max_tokens)

    def _plan(self, lives: Sequence[_Live], drafts: Drafts, num_waiting: int) -> Integers:
        """How much of each draft is worth verifying, [m]."""
        self._drafts = drafts
        running = [
            Running(
                live.name,
                live.problem,
                live.num_read - live.num_prompt,
                live.limit - live.num_prompt,
            )
            for live in lives
        ]
        allowed = within_batch(drafts.num_tokens.astype(np.int64), self._batch_limit)
        if self._planner is not None:
            allowed = self._planner.plan(running, drafts, num_waiting)
        self._totals.num_cold_rounds += int((drafts.num_tokens == 0).sum())
        siblings = drafts.generations == self._generation
        for index, live in enumerate(lives):
            live.planned, live.row, live.num_drafted = running[index], index, int(allowed[index])
            live.from_siblings = bool(siblings[index])
            if live.num_drafted:
                self._totals.count_draft(live.num_drafted, live.from_siblings)
        return allowed
