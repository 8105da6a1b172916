"""The rollout worker: an engine on its thread behind an asyncio interface (an actor in a run)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Protocol

from paceline.configs.vocabulary import Completion, DraftText, RolloutRequest, WeightVersion
from paceline.rollout.engine import Engine
from paceline.rollout.engine_thread import EngineThread
from paceline.weights_sync.handle import WeightHandle


class DraftTextBlock(Protocol):
    """Draft texts that the controller published, and which versions are to be drafted from.

    Texts of versions before ``drop_before`` are to be dropped.
    """

    drop_before: int | None

    def read(self, subscriber: int) -> Sequence[DraftText]:
        """Return all texts but those that the subscriber's engine sampled; may take a while."""


class RolloutWorker:
    """Samples completions for whoever asks; many requests share the engine's batch.

    It holds no queue of its own and decides nothing: which requests come here, and when weights
    change, is the controller's business.
    """

    def __init__(self, build_engine: Callable[[], Engine]) -> None:
        self._engine = EngineThread(build_engine)
        self._engine.wait_ready()
        self._started = time.perf_counter()

    async def generate(self, request: RolloutRequest) -> tuple[Completion, ...]:
        """Return all completions of one request, once the last of them ended its segment.

        Unfinished ones (`Completion.is_finished`) can be continued here or on any other worker.
        """
        return await asyncio.wrap_future(self._engine.generate(request))

    async def interrupt(self, request_id: str) -> bool:
        """Have a pending `generate` answered now, with what there is; False: it is not here."""
        return await asyncio.wrap_future(self._engine.interrupt(request_id))

    async def update_weights(self, handle: WeightHandle) -> tuple[WeightVersion, int]:
        """Serve a published version; acknowledges it with the checksum of the bytes it loaded.

        The announced checksum is that of the loaded bytes: the engine compares it with the bytes
        before and after it copies them, and an engine that finds another one stops.
        """
        version = await asyncio.wrap_future(self._engine.update_weights(handle))
        return version, handle.checksum

    async def add_draft_text(self, block: DraftTextBlock, subscriber: int) -> None:
        """Read a block, beside the engine's thread, and draft from its texts from now on."""
        texts = await asyncio.to_thread(block.read, subscriber)
        if block.drop_before is not None:
            await asyncio.wrap_future(self._engine.drop_draft_text(block.drop_before))
        await asyncio.wrap_future(self._engine.add_draft_text(texts))

    async def counters(self) -> dict[str, float]:
        """Running totals of the engine, and the seconds the worker has been up."""
        up = {"up_seconds": time.perf_counter() - self._started}
        return asdict(self._engine.counters) | dict(self._engine.draft_counters) | up

    async def close(self) -> None:
        """Stop the engine's thread."""
        await asyncio.to_thread(self._engine.close)
