"""The thread that owns an engine and steps it, with an asyncio interface."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

from paceline.configs.vocabulary import Completion, DraftText, RolloutRequest
from paceline.rollout.engine import Engine, RolloutResult
from paceline.weights_sync.handle import Acknowledgement, WeightHandle

DRAFT_TOKENS_PER_STEP = 4096
"""Most tokens of draft text that are added between two steps: more would delay decoding."""


@dataclass
class EngineCounters:
    """Running totals of one engine: steps, sampled tokens, added tokens of draft text, seconds."""

    num_steps: int = 0
    num_tokens: int = 0
    num_draft_text_tokens: int = 0
    busy_seconds: float = 0.0
    update_seconds: float = 0.0
    draft_text_seconds: float = 0.0


@dataclass(frozen=True)
class PendingRequest:
    """A request the engine has not answered, and the future of its answer."""

    request: RolloutRequest
    answer: Future[tuple[Completion, ...]]


@dataclass(frozen=True)
class PendingDraftText:
    """Draft texts to be added, a part between two steps each."""

    parts: Iterator[Sequence[DraftText]]
    added: Future[None]


class EngineThread:
    """A thread that builds an engine and steps it for as long as it has work.

    Consumes an inbox of actions (requests, interruptions, weight updates) and runs them between two
    steps: that is what makes version spans exact. There it also adds some of the pending
    draft text. With no request and no draft text left it blocks on the inbox. An exception out of
    the engine ends the thread and fails every pending and later call with it.

    ``ready`` is done once the engine is built, and holds what its construction raised.
    """

    def __init__(self, build_engine: Callable[[], Engine]) -> None:
        self._inbox: queue.SimpleQueue[tuple[Callable[[], None], Future[Any]] | None]
        self._inbox = queue.SimpleQueue()
        self._pending: dict[str, PendingRequest] = {}
        self._draft_texts: deque[PendingDraftText] = deque()
        self._failure: BaseException | None = None
        self.ready: Future[None] = Future()
        self.counters = EngineCounters()
        self._thread = threading.Thread(
            target=self._run, args=(build_engine,), name="engine", daemon=True
        )
        self._thread.start()

    def generate(self, request: RolloutRequest) -> Future[tuple[Completion, ...]]:
        """Queue a request; the future holds its completions, unfinished where the segment ended."""
        future: Future[tuple[Completion, ...]] = Future()

        def add() -> None:
            try:
                assert self._engine.version is not None, "the engine was never given weights"
                self._engine.add(request)
            except ValueError as error:  # one that cannot be served does not hurt others
                reject(future, error)
                return
            self._pending[request.request_id] = PendingRequest(request, future)

        self._submit(add, future)
        return future

    def interrupt(self, request_id: str) -> Future[bool]:
        """Answer a request with what it has before the next step; False if it is not here."""
        future: Future[bool] = Future()

        def interrupt() -> None:
            result = self._engine.interrupt(request_id)
            if result is not None:
                self._answer(result)
            resolve(future, result is not None)

        self._submit(interrupt, future)
        return future

    def update_weights(self, handle: WeightHandle) -> Future[Acknowledgement]:
        """Load a published version before the next step; the future holds what the engine serves
        then.

        Requests that the engine aborts are answered with what they have.
        """
        future: Future[Acknowledgement] = Future()

        def update() -> None:
            started = time.perf_counter()
            for result in self._engine.update_weights(handle):
                self._answer(result)
            self.counters.update_seconds += time.perf_counter() - started
            resolve(future, (self._engine.version, self._engine.checksum))

        self._submit(update, future)
        return future

    def add_draft_text(self, texts: Sequence[DraftText]) -> Future[None]:
        """Add texts to draft from, a part after each step; done when the engine has them all."""
        future: Future[None] = Future()
        pending = PendingDraftText(in_parts(texts, DRAFT_TOKENS_PER_STEP), future)
        self._submit(lambda: self._draft_texts.append(pending), future)
        return future

    def drop_draft_text(self, before: int) -> Future[None]:
        """Have the engine stop drafting from versions before ``before``."""
        future: Future[None] = Future()

        def drop() -> None:
            self._engine.drop_draft_text(before)
            resolve(future, None)

        self._submit(drop, future)
        return future

    @property
    def draft_counters(self) -> Mapping[str, float]:
        """Running totals of the engine's drafting."""
        return self._engine.draft_counters

    def close(self) -> None:
        """Stop after the current step."""
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _submit(self, action: Callable[[], None], future: Future[Any]) -> None:
        self._inbox.put((action, future))
        if self._failure is not None:
            reject(future, self._failure)

    def _run(self, build_engine: Callable[[], Engine]) -> None:
        try:
            self._engine = build_engine()
        except BaseException as error:
            self._fail(error)
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        try:
            while self._drain_inbox():
                if self._draft_texts:
                    self._add_draft_part(self._draft_texts[0])
                if self._engine.has_work():
                    self._step()
        except BaseException as error:
            self._fail(error)

    def _drain_inbox(self) -> bool:
        """Run every queued action, blocking while there is nothing to do; False when closed."""
        while True:
            idle = not self._engine.has_work() and not self._draft_texts
            try:
                item = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if item is None:
                return False
            action, future = item
            try:
                action()
            except BaseException as error:
                reject(future, error)
                raise

    def _step(self) -> None:
        started = time.perf_counter()
        for result in self._engine.step():
            self._answer(result)
        self.counters.num_steps += 1
        self.counters.busy_seconds += time.perf_counter() - started

    def _add_draft_part(self, pending: PendingDraftText) -> None:
        started = time.perf_counter()
        part = next(pending.parts, None)
        if part is None:
            self._draft_texts.popleft()
            resolve(pending.added, None)
            return
        self._engine.add_draft_text(part)
        self.counters.num_draft_text_tokens += sum(len(text.token_ids) for text in part)
        self.counters.draft_text_seconds += time.perf_counter() - started

    def _answer(self, result: RolloutResult) -> None:
        pending = self._pending.pop(result.request_id)
        self.counters.num_tokens += num_tokens(result.completions)
        self.counters.num_tokens -= num_tokens(pending.request.partial)  # of earlier segments
        resolve(pending.answer, result.completions)

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        for pending in self._pending.values():
            reject(pending.answer, error)
        self._pending.clear()
        for draft_text in self._draft_texts:
            reject(draft_text.added, error)
        self._draft_texts.clear()
        with contextlib.suppress(queue.Empty):
            while item := self._inbox.get_nowait():
                reject(item[1], error)


def num_tokens(completions: Iterable[Completion]) -> int:
    """Return the number of tokens that completions hold together."""
    return sum(len(completion.token_ids) for completion in completions)


def in_parts(texts: Iterable[DraftText], max_tokens: int) -> Iterator[Sequence[DraftText]]:
    """Yield texts in order, in parts of at most ``max_tokens`` tokens; a longer text is alone."""
    part: list[DraftText] = []
    size = 0
    for text in texts:
        if part and size + len(text.token_ids) > max_tokens:
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text.token_ids)
    if part:
        yield part


def resolve(future: Future[Any], value: Any) -> None:
    """Set a future's result unless its caller gave up."""
    with contextlib.suppress(InvalidStateError):
        future.set_result(value)


def reject(future: Future[Any], error: BaseException) -> None:
    """Fail a future unless it already has a result."""
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
