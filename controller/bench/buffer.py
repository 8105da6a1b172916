"""``paceline bench buffer``: groups a second through their whole life, for each store.

The real buffer, journal and stores; only the engines are fakes, which answer at once with samples
made beforehand. A thousand worker tasks claim and finish; one consumer batches, trains and, every
so many steps, settles what a checkpoint would make final. Every figure is of a process of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from paceline.configs.vocabulary import (
    Completion,
    Group,
    Prompt,
    Sample,
    VersionSpan,
    WeightVersion,
)
from paceline.controller.bench.harness.compare import Case, compare
from paceline.controller.bench.harness.redis_server import redis_server
from paceline.controller.bench.harness.resident_memory import resident_bytes
from paceline.controller.bench.harness.result import BenchResult, Figures, Measured, Target
from paceline.controller.bench.harness.subprocesses import in_own_process
from paceline.controller.groups.buffer import WorkBuffer
from paceline.controller.groups.freshness import FreshnessBudget
from paceline.controller.ledger.events import Kind
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from paceline.controller.ledger.redis_streams import RedisStore
from paceline.controller.ledger.sqlite import SQLiteStore
from paceline.controller.ledger.store import Store

StoreName = Literal["memory", "sqlite", "redis"]

GROUPS_PER_STEP = 32
NUM_WORKERS = 1000
MOST_FINISHED = 2000
STEPS_PER_CHECKPOINT = 25
SAMPLES, TOKENS = 4, 1564
"""A group of 50 KB: int32 ids, float32 log-probabilities and a mask of each token."""

TARGETS: dict[StoreName, float] = {"memory": 20_000, "sqlite": 2_000, "redis": 5_000}
LIVES: dict[StoreName, int] = {"memory": 80_000, "sqlite": 12_000, "redis": 24_000}
OUTSTANDING = {f"{count:,}": count for count in (1_000, 10_000, 100_000)}
FEWEST, MOST = "1,000", "100,000"
STORES = f"{MOST} groups outstanding, {NUM_WORKERS:,} workers, 50 KB a group"
GROWTH = "cost by number outstanding (memory)"
RATE, CPU = "groups/s", "controller CPU, µs/group"


@dataclass(frozen=True)
class Life:
    """One measurement: ``num_groups`` live with ``outstanding`` groups in the buffer."""

    store: StoreName
    outstanding: int
    num_groups: int


def bench_buffer(quick: bool, output: Path) -> BenchResult:
    """Measure every store with 100,000 groups outstanding, and memory with fewer too.

    Raises:
        BenchError: there is no redis-server.
    """
    scale, num_rounds = (4, 1) if quick else (1, 3)
    stores: dict[str, StoreName] = {name: name for name in TARGETS}

    def measure_one(case: str, variant: str, _: int) -> Figures:
        name = stores.get(variant, "memory")
        outstanding = OUTSTANDING.get(variant, OUTSTANDING[MOST])
        return in_own_process(measure, Life(name, outstanding, LIVES[name] // scale), output)

    return compare(
        "buffer",
        {STORES: Case(list(TARGETS), num_rounds), GROWTH: Case(list(OUTSTANDING), 1)},
        measure_one,
        targets_of(),
        ratios=[(CPU, FEWEST)],
    )


def targets_of() -> list[Target]:
    """Return what is asked: a rate of each store, and that the cost a group is flat."""

    def rate(store: str, measured: Measured) -> list[float]:
        return measured.values(STORES, store, RATE)

    def growth(measured: Measured) -> list[float]:
        return measured.ratios(GROWTH, MOST, FEWEST, CPU)

    rates = [
        Target(f"{name}, groups/s", ">=", wanted, partial(rate, name))
        for name, wanted in TARGETS.items()
    ]
    return [*rates, Target("CPU a group, 100,000 over 1,000 outstanding", "<=", 1.5, growth)]


def measure(life: Life, output: Path) -> Figures:
    """Run one life; files go below ``output`` and are removed."""
    with _store(life.store, output) as store:
        return asyncio.run(_Lives(life, store).run())


class _Lives:
    """Surroundings of the buffer while a life is measured: feed, workers and trainer."""

    def __init__(self, life: Life, store: Store) -> None:
        self._life = life
        self._journal = Journal(store, revocable=store.survives)
        budget = FreshnessBudget(life.outstanding, 1, GROUPS_PER_STEP)
        self._group = _group()
        self._buffer = WorkBuffer(budget, self._journal, MOST_FINISHED * self._group.num_bytes)
        self._prompts = ((i, Prompt(f"p{i}", "", (1, 2, 3))) for i in itertools.count())
        self._most_bytes = 0

    async def run(self) -> Figures:
        before = resident_bytes()
        for _ in range(self._life.outstanding):
            await self._buffer.admit(self._prompts.__next__)
        await self._journal.flush()
        full = resident_bytes()
        async with asyncio.TaskGroup() as group:  # a ledger that fails ends all of it
            tasks = [group.create_task(self._work()) for _ in range(NUM_WORKERS)]
            tasks.append(group.create_task(self._feed()))
            began, cpu = time.perf_counter(), time.process_time()
            trained = await self._train()
            await self._journal.flush()
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            for task in tasks:
                task.cancel()
        await self._journal.flush()
        return {
            RATE: trained / seconds,
            CPU: 1e6 * cpu / trained,
            "bytes/outstanding": (full - before) / self._life.outstanding,
            "RSS, MB": full / 1e6,
            "most samples held, MB": self._most_bytes / 1e6,
        }

    async def _feed(self) -> None:
        while True:
            await self._buffer.admit(self._prompts.__next__)

    async def _work(self) -> None:
        while work := await self._buffer.claim():
            await asyncio.sleep(0)  # an engine answers later, however fast
            await self._buffer.finish(replace(self._group, group_id=work.group_id))

    async def _train(self) -> int:
        for step in range(self._life.num_groups // GROUPS_PER_STEP):
            groups = []
            for _ in range(GROUPS_PER_STEP):
                group = await self._buffer.take()
                assert group is not None
                groups.append(group.group_id)
            self._most_bytes = max(self._most_bytes, self._buffer.num_bytes)
            batch = {"trained": groups, "held": [], "dropped": {}}
            await self._journal.write(Kind.BATCHED, step, batch)
            self._journal.note(Kind.TRAINED, step, {"checksum": step})
            self._buffer.release(tuple(groups))
            if step % STEPS_PER_CHECKPOINT == STEPS_PER_CHECKPOINT - 1:
                self._journal.settle(step + 1)
        return GROUPS_PER_STEP * (step + 1)


def _group() -> Group:
    completion = Completion(
        token_ids=np.arange(TOKENS, dtype=np.int32),
        logprobs=np.full(TOKENS, -1.0, dtype=np.float32),
        versions=(VersionSpan(WeightVersion(0), 0, TOKENS),),
        finish_reason="stop",
    )
    sample = Sample(completion, reward=1.0, text="answer")
    return Group(0, Prompt("p", "", (1, 2, 3)), (sample,) * SAMPLES)


@contextmanager
def _store(name: StoreName, output: Path) -> Iterator[Store]:
    folder = output / f"buffer-{name}-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        if name == "memory":
            yield MemoryStore()
        elif name == "sqlite":
            store: Store = SQLiteStore(folder / "ledger.sqlite")
            yield store
            store.close()
        else:
            with redis_server(folder) as url:
                store = RedisStore(url, "bench")
                yield store
                store.close()
    finally:
        shutil.rmtree(folder)
