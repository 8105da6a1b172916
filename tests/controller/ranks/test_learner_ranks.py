"""Learner ranks of a real Ray with a real process group: one that hangs is named, in time."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time

import pytest

from paceline.configs.errors import ClusterError
from paceline.controller.cluster import placement
from paceline.controller.ranks.learner_ranks import start_learner_ranks

pytestmark = pytest.mark.usefixtures("local_ray")

HANG_SECONDS = 4.0
LIMIT_SECONDS = 120.0
RESOURCES = {"cpus": 0, "gpus": 0, "environment": {"OMP_NUM_THREADS": "1"}}


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, LIMIT_SECONDS))


def rank_class():
    """A rank that sums over all ranks; pickled by value: actors cannot import tests."""

    class Rank:
        def __init__(self, rank, rendezvous):
            import torch
            import torch.distributed as dist

            from paceline.learner.activity import collectives_begun

            self.rank, self.torch, self.dist = rank, torch, dist
            self.collectives_begun = collectives_begun  # imported before anybody asks
            self.doing = ""
            if rendezvous is not None:
                dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)

        def publish(self, what):
            self.doing = "first sum"
            self.dist.all_reduce(self.torch.ones(1))
            if what == "hang" and self.rank == 1:
                self.doing = "a nap"
                self.nap()
            if what == "die" and self.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "stop" and self.rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            if what == "work":
                self.work()
            self.dist.all_reduce(self.torch.ones(1))
            return os.getpid()

        def work(self):
            """A third of the time, without the GIL: it answers on a machine busy with others."""
            matrix, until = self.torch.ones(1000, 1000), time.monotonic() + 2 * HANG_SECONDS
            while time.monotonic() < until:
                matrix @ matrix
                time.sleep(0.05)

        def export(self, what):
            self.doing = what
            (self.work if what == "work" else self.nap)()

        def nap(self):
            time.sleep(3600)

        def progress(self):
            from paceline.configs.vocabulary import RankProgress

            return RankProgress(7, self.doing, self.collectives_begun())

        def close(self):
            return None

    return Rank


async def ranks_in(folder, num_ranks=2):
    return await start_learner_ranks(
        rank_class(), num_ranks, hang_seconds=HANG_SECONDS, reports=folder, **RESOURCES
    )


def failure_of(what, folder):
    """The error of a call in which something happens to rank 1, and the seconds until then."""

    async def scenario():
        ranks = await ranks_in(folder)
        await ranks.publish("nothing")
        began = time.monotonic()
        try:
            with pytest.raises(ClusterError) as caught:
                await ranks.publish(what)
            seconds = time.monotonic() - began
            with pytest.raises(ClusterError) as again:
                await ranks.publish("nothing")
            assert again.value is caught.value
            return caught.value, seconds
        finally:
            await ranks.close()

    error, seconds = run(scenario())
    assert "\n" not in str(error)
    return str(error), seconds


def test_a_rank_whose_python_hangs_is_named_with_everybodys_stack(tmp_path):
    error, seconds = failure_of("hang", tmp_path)
    assert seconds < 2.5 * HANG_SECONDS
    assert "learner rank 1 holds up the others" in error
    assert "in publish (a nap) of step 7, at nap (" in error
    assert "waiting: rank 0 in all_reduce" in error
    (report,) = tmp_path.glob("hang-*.txt")
    assert str(report) in error
    text = report.read_text()
    assert "== learner rank 0: in publish (first sum) of step 7" in text
    assert "in nap" in text
    assert "distributed_c10d.py" in text


def test_a_stopped_process_is_named(tmp_path):
    error, seconds = failure_of("stop", tmp_path)
    assert seconds < 3 * HANG_SECONDS
    assert "learner rank 1 does not answer" in error
    assert "in publish" in next(tmp_path.glob("hang-*.txt")).read_text()


def test_a_dead_rank_is_named_though_its_neighbour_fails_first(tmp_path):
    error, _ = failure_of("die", tmp_path)
    assert "learner rank 1 died" in error


def test_ranks_that_work_longer_than_a_hang_may_take_are_left_alone(tmp_path):
    async def scenario():
        ranks = await ranks_in(tmp_path)
        await ranks.publish("work")
        await ranks.close()

    run(scenario())
    assert list(tmp_path.iterdir()) == []


def test_a_rank_alone_may_work_long_and_is_named_when_it_only_hangs(tmp_path):
    async def scenario():
        ranks = await ranks_in(tmp_path, num_ranks=1)
        await ranks.export("work")
        began = time.monotonic()
        with pytest.raises(ClusterError) as caught:
            await ranks.export("a nap")
        seconds = time.monotonic() - began
        await ranks.close()
        return str(caught.value), seconds

    error, seconds = run(scenario())
    assert seconds < 2.5 * HANG_SECONDS
    assert "learner rank 0 does nothing for" in error
    assert "in export (a nap) of step 7, at nap (" in error
    (report,) = tmp_path.glob("hang-*.txt")
    assert "in nap" in report.read_text()


def test_ranks_that_no_nodes_have_room_for_are_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "PLACEMENT_SECONDS", 2.0)
    start = functools.partial(
        start_learner_ranks, rank_class(), 2, hang_seconds=HANG_SECONDS, reports=tmp_path, gpus=0
    )
    with pytest.raises(ClusterError, match="2 learner ranks of 1 CPUs each on a node of its own"):
        run(start(cpus=1, environment={}, placement="spread"))

    async def packed():
        ranks = await start(cpus=0.5, environment={})
        await ranks.publish("nothing")
        await ranks.close()

    run(packed())
