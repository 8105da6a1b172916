"""Rollout workers that die, hang, lie or take their time when told to, and what to ask of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np

from paceline.configs.vocabulary import (
    Completion,
    RolloutRequest,
    SamplingParameters,
    VersionSpan,
    WeightVersion,
)
from paceline.controller.engines.pool import WorkerPool
from paceline.controller.engines.watching import TimeLimits
from paceline.controller.groups.buffer import WorkerLost
from paceline.weights_sync.handle import WeightHandle
from paceline.weights_sync.layout import Layout

PATIENCE = 1000
"""Seconds, none of them real, after which a test waits for something that will not happen."""
CLAIM_SECONDS, ANSWER_SECONDS, START_SECONDS = 60.0, 4.0, 30.0


class FakeWorker:
    """Serves instantly while its gate is open; a closed gate is left with an interrupt only.

    ``hangs`` answers nothing at all, ``stuck`` is an engine that does not while its process does.
    """

    def __init__(self, *, acknowledges=lambda handle: (handle.version, handle.checksum)):
        self.acknowledges = acknowledges
        self.version = None
        self.dead = self.hangs = self.stuck = self.closed = False
        self.requests = []
        self.interrupted = []
        self.running = {}
        self.known, self.dropped_before = [], None
        self.gate = asyncio.Event()
        self.gate.set()

    async def generate(self, request):
        self.requests.append((request.request_id, self.version))
        interrupted = self.running[request.request_id] = asyncio.Event()
        gate, interrupt = (
            asyncio.ensure_future(event.wait()) for event in (self.gate, interrupted)
        )
        try:
            await asyncio.wait((gate, interrupt), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gate.cancel(), interrupt.cancel()
            del self.running[request.request_id]
        await self._answers(self.stuck)
        return self._sampled(request, "stop" if self.gate.is_set() else "abort")

    async def interrupt(self, request_id):
        await self._answers(self.stuck)
        self.interrupted.append(request_id)
        if request_id in self.running:
            self.running[request_id].set()
            return True
        return False

    async def update_weights(self, handle):
        await asyncio.sleep(0)
        await self._answers(self.stuck)
        self.version = handle.version
        return self.acknowledges(handle)

    async def add_draft_text(self, block, subscriber):
        await asyncio.sleep(0)
        await self._answers(self.stuck)
        self.known += block.read(subscriber)
        self.dropped_before = block.drop_before or self.dropped_before

    async def counters(self):
        await self._answers()
        return {"num_tokens": 1.0}

    async def close(self):
        self.dead = self.closed = True

    async def _answers(self, stuck=False):
        if self.dead:
            raise WorkerLost
        if self.hangs or stuck:
            await asyncio.Event().wait()

    def _sampled(self, request, reason):
        version = self.version or 0
        earlier = request.partial or (tokens_of(0, version, "abort"),) * request.num_samples
        return tuple(
            each if each.is_finished else tokens_of(len(each.token_ids) + 1, version, reason)
            for each in earlier
        )


def tokens_of(length, version=0, reason="stop"):
    spans = (VersionSpan(WeightVersion(version), 0, length),) if length else ()
    ids = np.arange(length, dtype=np.int32)
    return Completion(ids, np.zeros(length, dtype=np.float32), spans, reason)


def handle(version):
    return WeightHandle(WeightVersion(version), "", 100 + version, Layout(()))


def request(name, num_samples=1, prompt=(1,), max_tokens=64, partial=(), segment_tokens=0):
    sampling = SamplingParameters(max_tokens=max_tokens)
    return replace(
        RolloutRequest(name, prompt, sampling, num_samples, seed=0),
        partial=partial,
        segment_tokens=segment_tokens,
    )


def pool_of(
    workers, spares=(), max_restarts=3, max_samples=1000, section="rollout", draft_publisher=None
):
    spares = list(spares)

    async def start(index):
        await asyncio.sleep(START_SECONDS)
        return spares.pop(0)

    return WorkerPool(
        workers,
        start,
        max_restarts=max_restarts,
        max_samples=max_samples,
        limits=TimeLimits(CLAIM_SECONDS, ANSWER_SECONDS),
        section=section,
        draft_publisher=draft_publisher,
    )


async def serving(workers, *arguments, **settings):
    """A pool whose workers serve version 0."""
    pool = pool_of(workers, *arguments, **settings)
    await pool.update_weights(handle(0))
    return pool


def shut(*workers):
    """Have workers hold the requests they get."""
    for worker in workers:
        worker.gate.clear()


async def cancelled(*tasks):
    """Cancel tasks and see them end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def seconds_until(awaitable):
    """How long it took, and its result."""
    clock = asyncio.get_running_loop().time
    began = clock()
    result = await awaitable
    return clock() - began, result
