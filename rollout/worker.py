"""The rollout worker: an engine on its thread behind an asyncio interface, a Ray actor in runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Protocol

from paceline.configs.vocabulary import Completion, DraftText, RolloutRequest
from paceline.rollout.engine import Engine
from paceline.rollout.engine_thread import EngineThread
from paceline.weights_sync.handle import Acknowledgement, WeightHandle


class DraftTextBlock(Protocol):
    """Draft texts that the controller published, and which versions are to be drafted from.

    Texts of versions before ``drop_before`` are to be dropped.
    """

    drop_before: int | None

    def read(self, subscriber: int) -> Sequence[DraftText]:
        """Return all texts but those that the subscriber's engine sampled; may take a while."""


class RolloutWorker:
    """Sampler of completions for many requests, which share the engine's batch.

    It holds no queue of its own and decides nothing: which requests come here, and when weights
    change, is the controller's business.

    Its constructor only begins to build the engine, and does not fail: Ray would turn an error of
    the constructor of an actor into text. `ready` raises it as what it is.
    """

    def __init__(self, build_engine: Callable[[], Engine]) -> None:
        self._engine = EngineThread(build_engine)
        self._started = time.perf_counter()

    async def ready(self) -> None:
        """Return once the engine is built; raises what its construction raised."""
        await asyncio.wrap_future(self._engine.ready)
        self._started = time.perf_counter()

    async def generate(self, request: RolloutRequest) -> tuple[Completion, ...]:
        """Return all completions of one request, once the last of them ended its segment.

        Unfinished ones (`Completion.is_finished`) can be continued here or on any other worker.
        """
        return await asyncio.wrap_future(self._engine.generate(request))

    async def interrupt(self, request_id: str) -> bool:
        """Have a pending `generate` answered now, with what there is; False: it is not here."""
        return await asyncio.wrap_future(self._engine.interrupt(request_id))

    async def update_weights(self, handle: WeightHandle) -> Acknowledgement:
        """Load a published version; return what the engine then serves.

        An engine that finds bytes other than those announced stops.
        """
        return await asyncio.wrap_future(self._engine.update_weights(handle))

    async def add_draft_text(self, block: DraftTextBlock, subscriber: int) -> None:
        """Read a block, beside the engine's thread, and draft from its texts from now on."""
        texts = await asyncio.to_thread(block.read, subscriber)
        if block.drop_before is not None:
            await asyncio.wrap_future(self._engine.drop_draft_text(block.drop_before))
        await asyncio.wrap_future(self._engine.add_draft_text(texts))

    async def counters(self) -> dict[str, float]:
        """Return running totals of the engine, and the seconds the worker has been up."""
        up = {"up_seconds": time.perf_counter() - self._started}
        return asdict(self._engine.counters) | dict(self._engine.draft_counters) | up

    async def close(self) -> None:
        """Stop the engine's thread."""
        await asyncio.to_thread(self._engine.close)
