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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from paceline.configs.vocabulary import (
    Completion,
    Group,
    Prompt,
    Sample,
    VersionSpan,
    WeightVersion,
)
from paceline.controller.bench.harness.redis_server import redis_server
from paceline.controller.bench.harness.result import BenchResult, BenchTable, Spread, Target
from paceline.controller.bench.harness.subprocesses import in_own_process
from paceline.controller.groups.buffer import WorkBuffer
from paceline.controller.groups.freshness import FreshnessBudget
from paceline.controller.ledger.events import Kind
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from paceline.controller.ledger.redis_streams import RedisStore
from paceline.controller.ledger.sqlite import SQLiteStore
from paceline.controller.ledger.store import Store
from paceline.controller.observe.files.versions import collect_versions

StoreName = Literal["memory", "sqlite", "redis"]

GROUPS_PER_STEP = 32
NUM_WORKERS = 1000
MOST_FINISHED = 2000
STEPS_PER_CHECKPOINT = 25
SAMPLES, TOKENS = 4, 1564
"""A group of 50 KB: int32 ids, float32 log-probabilities and a mask of each token."""

TARGETS: dict[StoreName, float] = {"memory": 20_000, "sqlite": 2_000, "redis": 5_000}
OUTSTANDING = (1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Case:
    """One measurement: ``num_groups`` lives with ``outstanding`` groups in the buffer."""

    store: StoreName
    outstanding: int
    num_groups: int


@dataclass(frozen=True)
class Measured:
    """Of one case. CPU microseconds are this process's, all its threads; bytes are of memory."""

    groups_per_second: float
    cpu_microseconds: float
    resident_bytes_before: int
    resident_bytes_full: int
    most_sample_bytes: int

    def bytes_per_outstanding(self, outstanding: int) -> float:
        """What one more group that waits costs, its prompt included."""
        return (self.resident_bytes_full - self.resident_bytes_before) / outstanding


def bench_buffer(quick: bool, output: Path) -> BenchResult:
    """Measure every store with 100,000 groups outstanding, and memory with fewer too.

    Raises:
        BenchError: there is no redis-server.
    """
    scale, rounds = (4, 1) if quick else (1, 3)
    lives: dict[StoreName, int] = {"memory": 80_000, "sqlite": 12_000, "redis": 24_000}
    found: dict[StoreName, list[Measured]] = {name: [] for name in TARGETS}
    for _ in range(rounds):
        for name in TARGETS:
            case = Case(name, OUTSTANDING[-1], lives[name] // scale)
            found[name].append(in_own_process(measure, case, output))
    growth = {
        n: in_own_process(measure, Case("memory", n, lives["memory"] // scale), output)
        for n in OUTSTANDING
    }
    return _result(found, growth)


def measure(case: Case, output: Path) -> Measured:
    """Run one case; files go below ``output`` and are removed."""
    with _store(case.store, output) as store:
        return asyncio.run(_Lives(case, store).run())


class _Lives:
    """Everything around the buffer while a case is measured."""

    def __init__(self, case: Case, store: Store) -> None:
        self._case = case
        self._journal = Journal(store, revocable=store.survives)
        budget = FreshnessBudget(case.outstanding, 1, GROUPS_PER_STEP)
        self._group = _group()
        self._buffer = WorkBuffer(budget, self._journal, MOST_FINISHED * self._group.num_bytes)
        self._prompts = ((i, Prompt(f"p{i}", "", (1, 2, 3))) for i in itertools.count())
        self._most_bytes = 0

    async def run(self) -> Measured:
        before = _resident_bytes()
        for _ in range(self._case.outstanding):
            await self._buffer.admit(self._prompts.__next__)
        await self._journal.flush()
        full = _resident_bytes()
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
        return Measured(trained / seconds, 1e6 * cpu / trained, before, full, self._most_bytes)

    async def _feed(self) -> None:
        while True:
            await self._buffer.admit(self._prompts.__next__)

    async def _work(self) -> None:
        while work := await self._buffer.claim():
            await asyncio.sleep(0)  # an engine answers later, however fast
            await self._buffer.finish(replace(self._group, group_id=work.group_id))

    async def _train(self) -> int:
        for step in range(self._case.num_groups // GROUPS_PER_STEP):
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


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _result(found: dict[StoreName, list[Measured]], growth: dict[int, Measured]) -> BenchResult:
    rates = {name: Spread.of(m.groups_per_second for m in each) for name, each in found.items()}
    cpu = {name: Spread.of(m.cpu_microseconds for m in each) for name, each in found.items()}
    stores = BenchTable(
        f"{OUTSTANDING[-1]:,} groups outstanding, {NUM_WORKERS:,} workers, 50 KB a group",
        ("store", "groups/s", "controller CPU, µs/group", "most samples held, MB"),
        [
            (
                name,
                str(rates[name]),
                str(cpu[name]),
                f"{max(m.most_sample_bytes for m in each) / 1e6:.0f}",
            )
            for name, each in found.items()
        ],
    )
    sizes = BenchTable(
        "cost by number outstanding (memory)",
        ("outstanding", "groups/s", "controller CPU, µs/group", "bytes/outstanding", "RSS, MB"),
        [
            (
                f"{n:,}",
                f"{m.groups_per_second:.0f}",
                f"{m.cpu_microseconds:.1f}",
                f"{m.bytes_per_outstanding(n):.0f}",
                f"{m.resident_bytes_full / 1e6:.0f}",
            )
            for n, m in growth.items()
        ],
    )
    few, many = growth[OUTSTANDING[0]], growth[OUTSTANDING[-1]]
    flatness = many.cpu_microseconds / few.cpu_microseconds
    targets = {f"{name}, groups/s": Target(rates[name], ">=", TARGETS[name]) for name in TARGETS}
    targets["CPU a group, 100,000 over 1,000 outstanding"] = Target(
        Spread.of([flatness]), "<=", 1.5
    )
    figures: dict[str, Any] = {
        "stores": {name: [asdict(m) for m in each] for name, each in found.items()},
        "outstanding": {n: asdict(m) for n, m in growth.items()},
    }
    return BenchResult("buffer", targets, figures, {}, collect_versions(0), (stores, sizes))
