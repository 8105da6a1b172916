"""Proposer of drafts to vLLM: its ``custom_class``, without importing vLLM.

Samples of one prompt repeat each other. Their text is kept by prompt and weight version
(``history.py``): that of older versions, and that being sampled now, token by token. The longest
match of a sample's last tokens proposes what followed there, and the budget (``planner.py``) cuts
the draft to what pays. A draft only saves steps: the verifier decides what is sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.configs.schema.rollout import DraftingConfig
from paceline.configs.vocabulary import DRAFTED_FROM_HISTORY, DRAFTED_FROM_SIBLINGS, DraftText
from paceline.spec.budget.budget import within_batch
from paceline.spec.budget.draft_counters import DraftCounters
from paceline.spec.budget.planner import DraftPlanner, DraftVerification, RunningRequest
from paceline.spec.draft_text import OVERLAP_TOKENS, problem_name
from paceline.spec.history import Drafts, History

Integers = NDArray[np.int64]

MAX_MATCH = 32
"""Most tokens of a match: longer ones do not draft better."""


@dataclass(frozen=True)
class DraftRequest:
    """A sample that begins or continues: its row holds ``context``, the prompt's tokens first.

    ``max_tokens`` are the most tokens its row may get beyond them in this segment. ``coupled_seed``
    is the seed of its noise under coupled sampling. Under the ratio rule it is None: there a draft
    that depends on the verifier's random numbers would bias it.
    """

    prompt_token_ids: tuple[int, ...]
    context: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int]
    coupled_seed: int | None = None


@dataclass(slots=True)
class _Live:
    """A sample the engine works on.

    The reader has the first ``num_read`` tokens of its row. The history has the first
    ``num_learned``, as an open sequence of ``generation``; None if no sequence is open. The first
    ``num_drafted`` tokens of row ``row`` of the last drafts are being verified.
    """

    name: str
    problem: str
    request: DraftRequest
    reader_id: int
    num_read: int
    num_learned: int
    generation: int | None = None
    row: int = -1
    num_drafted: int = 0
    from_siblings: bool = False
    accepted: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def num_context(self) -> int:
        return len(self.request.context)

    @property
    def limit(self) -> int:
        """Most tokens that its row may have."""
        return self.num_context + self.request.max_tokens


@dataclass(slots=True)
class _Step:
    """One step of the engine: rows that got tokens, and seconds that drafting took."""

    num_rows: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    only_decoded: bool = False
    proposal_seconds: float = 0.0


class SuffixProposer:
    """Proposer of drafts from other samples of the same prompt, as far as they pay.

    vLLM builds it with its configuration and calls ``load_model`` and ``propose``; its owner calls
    ``attach`` before the first step, ``begin`` and ``finish`` for every sample, ``step_took`` after
    every step and ``serve`` between two when weights change. All on the engine's thread;
    ``add_draft_text`` on any.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._max_tokens = int(vllm_config.speculative_config.num_speculative_tokens)
        scheduling = vllm_config.scheduler_config
        # Every request's own token comes first: drafts must not displace any from its step.
        self._batch_limit = scheduling.max_num_batched_tokens - scheduling.max_num_seqs
        self._live: dict[str, _Live] = {}
        self._generation = -1
        self._drafts: Drafts | None = None
        self._step = _Step()
        self._drafting: list[_Live] = []  # samples with drafts in this step
        self._unseen: set[str] = set()  # samples whose next step reads what they have
        self._totals = DraftCounters()

    def load_model(self, target_model: Any) -> None:
        """Load nothing: this drafter has no model."""

    def attach(self, settings: DraftingConfig, rows_of: Callable[[], Sequence[str]]) -> None:
        """Set up for an engine; ``rows_of`` returns its batch's samples by name, in row order."""
        self._rows_of = rows_of
        self.history = History(settings.window, settings.max_memory_mb << 20)
        self._reader = self.history.reader(max_match=MAX_MATCH)
        self._planner = None
        if settings.budget != "none":
            objective = settings.budget or "makespan"
            self._planner = DraftPlanner(self._max_tokens, objective, self._batch_limit)

    def begin(self, name: str, request: DraftRequest) -> None:
        """Begin a sample that was queued under this name."""
        problem = problem_name(request.prompt_token_ids)
        num_read = max(0, len(request.context) - MAX_MATCH)
        num_learned = max(0, len(request.context) - OVERLAP_TOKENS)
        reader_id = self._reader.open(problem, request.coupled_seed, num_read)
        self._live[name] = _Live(name, problem, request, reader_id, num_read, num_learned)
        self._unseen.add(name)

    def finish(self, name: str, token_ids: NDArray[np.int32], by_itself: bool) -> NDArray[np.uint8]:
        """Finish a sample, which got ``token_ids`` and ended ``by_itself`` or was cut off.

        Returns:
            The draft source of each token, uint8 [len(token_ids)]; 0 where it was not drafted.
        """
        live = self._live.pop(name)
        self._unseen.discard(name)
        self._reader.close(live.reader_id)
        if len(token_ids):
            before = np.array(live.request.context[live.num_learned :], dtype=np.int32)
            rest = token_ids[max(0, live.num_learned - live.num_context) :]
            self._learn(live, np.concatenate([before, rest]))
        self._close_sequence(live)
        if self._planner is not None:
            length = live.num_context - len(live.request.prompt_token_ids) + len(token_ids)
            self._planner.finish(live.problem, length, by_itself)
        sources = np.zeros(len(token_ids), dtype=np.uint8)
        for start, count, source in live.accepted:
            sources[start : start + count] = source
        return sources

    def serve(self, version: int) -> None:
        """Begin a generation: from the next step on, weights of this version sample."""
        self._generation = version
        for live in self._live.values():
            self._close_sequence(live)
            live.num_learned = max(0, live.num_learned - OVERLAP_TOKENS)
            live.row = -1
        self._unseen.update(self._live)
        if self._planner is not None:
            self._planner.weights_changed()

    def add_draft_text(self, texts: Sequence[DraftText]) -> None:
        """Add texts that were sampled elsewhere to the history."""
        for text in texts:
            problem = problem_name(text.prompt_token_ids)
            self.history.add(problem, text.version, text.token_ids)

    def step_took(self, seconds: float) -> None:
        """Account for a step of the engine, proposing included, in the cost model."""
        step, self._step = self._step, _Step()
        if not step.num_rows:
            return
        self._totals.num_draft_steps += 1
        self._totals.num_drafting_steps += step.num_drafted > 0
        if self._planner is None:
            return
        self._planner.took(seconds, step.proposal_seconds)
        if not step.only_decoded:
            return
        if step.num_drafted:
            self._totals.seconds_drafting_steps += seconds
            without = self._planner.seconds_without(step.num_rows, step.num_accepted)
            self._totals.seconds_without_drafts += without
        self._planner.observe_step(step.num_rows, step.num_drafted, seconds)

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
        """Return a draft of at most ``num_speculative_tokens`` for every row; nothing at all if no
        row has one, which spares vLLM a pass over the rows.

        ``sampled_token_ids`` are each row's new tokens (none during prefill), ``token_ids_cpu``
        int32 [rows, L] all its tokens, of which the first ``num_tokens_no_spec`` [rows] are set.
        """
        started = time.perf_counter()
        names = self._rows_of()
        assert len(names) == len(sampled_token_ids), "a row of the batch has no request"
        asks = self._planner is None or self._planner.wants_drafts()
        if not asks and not self._unseen and not self._drafting:
            self._step.num_rows, self._step.only_decoded = len(names), True
            return []
        rows = [
            (row, live)
            for row, name in enumerate(names)
            if sampled_token_ids[row] and (live := self._live.get(name)) is not None
        ]
        self._verify(rows, sampled_token_ids)
        self._step.only_decoded &= len(rows) == len(names)
        proposed: list[list[int]] = []
        if rows and asks:
            num_waiting = max(0, len(self._live) - len(names))
            growing, texts = self._read(rows, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
            if growing:
                lives = [live for _, live in growing]
                drafts, allowed = self._draft(lives, texts, num_waiting)
                if allowed.any():
                    proposed = [[] for _ in names]
                for index in np.flatnonzero(allowed).tolist():
                    proposed[growing[index][0]] = drafts.tokens[index, : allowed[index]].tolist()
            self._step.proposal_seconds = time.perf_counter() - started
        self._totals.seconds_proposing += time.perf_counter() - started
        return proposed

    def _verify(
        self, rows: Sequence[tuple[int, _Live]], sampled_token_ids: Sequence[Sequence[int]]
    ) -> None:
        """Count accepted drafts: those of a row are its new tokens but one."""
        step = self._step
        step.num_rows = len(rows)
        step.only_decoded = True
        checked: list[tuple[int, int, int]] = []
        for row, live in rows:
            if live.name in self._unseen:
                self._unseen.remove(live.name)
                step.only_decoded = False
            count = len(sampled_token_ids[row]) - 1
            if not live.num_drafted or (live.row < 0 and not count):
                live.num_drafted = 0
                continue
            source = DRAFTED_FROM_SIBLINGS if live.from_siblings else DRAFTED_FROM_HISTORY
            live.accepted.append((live.num_read - live.num_context, count, source))
            self._totals.count_accepted(count, live.from_siblings)
            step.num_drafted += live.num_drafted
            step.num_accepted += count
            if live.row >= 0:
                checked.append((live.row, live.num_drafted, count))
            live.num_drafted = 0
        self._pass_over()
        if checked and self._planner is not None:
            assert self._drafts is not None
            columns = np.array(checked, dtype=np.int64).T
            self._planner.observe(DraftVerification(self._drafts, *columns))

    def _pass_over(self) -> None:
        """Mark samples whose drafts had no step. Preempted ones lost them and will read their text
        again; others have them verified later."""
        for live in self._drafting:
            if live.num_drafted and self._live.get(live.name) is live:
                live.row = -1
                self._unseen.add(live.name)
        self._drafting.clear()

    def _read(
        self,
        rows: Sequence[tuple[int, _Live]],
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
    ) -> tuple[list[tuple[int, _Live]], list[NDArray[np.int32]]]:
        """Add each row's new tokens to the history; return rows that go on, with these."""
        growing, texts = [], []
        for row, live in rows:
            sampled, end = sampled_token_ids[row], int(num_tokens[row])
            stops = live.request.stop_token_ids
            stop = next((i for i, token in enumerate(sampled) if token in stops), None)
            if stop is not None:  # what was accepted after it is not part of the sample
                end -= len(sampled) - 1 - stop
            end = min(end, live.limit)
            self._learn(live, token_ids[row, live.num_learned : end])
            if stop is None and end < live.limit:
                growing.append((row, live))
                texts.append(token_ids[row, live.num_read : end].copy())
            live.num_read = end
        return growing, texts

    def _learn(self, live: _Live, tokens: NDArray[np.int32]) -> None:
        """Add the next tokens of its row to the history, under the weights now served."""
        if live.generation is None:
            live.generation = self._generation
        self.history.extend(live.problem, live.generation, live.name, tokens)
        live.num_learned += len(tokens)

    def _close_sequence(self, live: _Live) -> None:
        if live.generation is not None:
            self.history.end_sequence(live.problem, live.generation, live.name)
            live.generation = None

    def _draft(
        self, lives: Sequence[_Live], texts: Sequence[NDArray[np.int32]], num_waiting: int
    ) -> tuple[Drafts, Integers]:
        """Return drafts, and how many tokens of each to verify, int64 [m]."""
        # One of the tokens still to come needs no draft.
        most = [min(live.limit - live.num_read - 1, self._max_tokens) for live in lives]
        drafts = self._reader.propose([live.reader_id for live in lives], texts, most)
        if self._planner is None:
            allowed = within_batch(drafts.num_tokens.astype(np.int64), self._batch_limit)
        else:
            allowed = self._planner.plan(self._running(lives), drafts, num_waiting)
        self._drafts = drafts
        self._totals.num_cold_rounds += int((drafts.num_tokens == 0).sum())
        siblings = drafts.generations == self._generation
        for index in np.flatnonzero(allowed).tolist():
            live = lives[index]
            live.row, live.num_drafted = index, int(allowed[index])
            live.from_siblings = bool(siblings[index])
            self._drafting.append(live)
            self._totals.count_draft(live.num_drafted, live.from_siblings)
        return drafts, allowed

    def _running(self, lives: Sequence[_Live]) -> list[RunningRequest]:
        """Return the samples as the planner takes them, with their completions' lengths."""
        running = []
        for live in lives:
            num_prompt = len(live.request.prompt_token_ids)
            num_tokens, limit = live.num_read - num_prompt, live.limit - num_prompt
            running.append(RunningRequest(live.name, live.problem, num_tokens, limit))
        return running
