"""Actors of a real Ray: what comes back from them, and what of their errors and deaths."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress

import pytest
import ray

from paceline.configs.errors import ClusterError, DataError
from paceline.configs.schema.learner import OptimizerConfig
from paceline.configs.vocabulary import RankProgress, StepReport, TrainBatch, WeightVersion
from paceline.controller.cluster.actors import LateClass, is_out_of_memory, result_of, start_actor
from paceline.controller.engines.worker_actor import RolloutActor, start_rollout_worker
from paceline.controller.groups.buffer import WorkerLost
from paceline.controller.ranks.learner_ranks import start_learner_ranks
from paceline.controller.ranks.rank import Rank
from paceline.rollout.worker import RolloutWorker

pytestmark = pytest.mark.usefixtures("local_ray")

RESOURCES = {"cpus": 0, "gpus": 0}
LIMIT_SECONDS = 120.0
"""How long anything here may take on a busy machine."""


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, LIMIT_SECONDS))


def worker_class():
    """The class of a fake rollout worker, pickled by value: workers cannot import tests."""

    class Worker:
        def __init__(self, build_engine):
            self.build_engine = build_engine
            self.release = asyncio.Event()

        async def ready(self):
            self.build_engine()

        async def generate(self, request):
            if request == "wait":
                await self.release.wait()
            self.release.set()
            return request

        async def interrupt(self, request_id):
            return self.release.set() is None and request_id == "wait"

        async def counters(self):
            return {"pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}

        async def update_weights(self, handle):
            raise handle

    return Worker


def rank_class():
    """The class of a fake learner rank that can wait for ever, as in a collective."""

    class Rank:
        def __init__(self, rank, rendezvous):
            self.rank, self.rendezvous = rank, rendezvous

        def publish(self, version):
            if version == "hang" and self.rank == 0:
                time.sleep(3600)
            if version == "hang":
                os.kill(os.getpid(), signal.SIGKILL)
            return f"{version} of rank {self.rank}, pid {os.getpid()}"

        def export(self, folder):
            return self.rendezvous

        def forward_backward(self, batch, algorithm):
            return StepReport(WeightVersion(batch.step), 10, 5, 0, 0.1, {"loss": 1.0})

        def optimizer_step(self, optimizer, step, num_steps):
            return {"step": step, "of": num_steps}

        def reset_optimizer(self):
            return None

        def progress(self):
            return RankProgress()

        def close(self):
            return None

    return Rank


async def rollout_worker(max_requests=8, **environment):
    return await start_rollout_worker(
        0, worker_class(), dict, environment=environment, max_requests=max_requests, **RESOURCES
    )


async def learner_ranks(num_ranks, factory=None, hang_seconds=60.0, reports=None, **options):
    return await start_learner_ranks(
        factory or rank_class(),
        num_ranks,
        environment={},
        hang_seconds=hang_seconds,
        reports=reports,
        **{**RESOURCES, **options},
    )


def is_alive(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def gone(pid):
    while is_alive(pid):
        await asyncio.sleep(0.05)


def test_a_worker_runs_in_its_own_process_and_environment_and_ends_with_close():
    async def scenario():
        worker = await rollout_worker(OMP_NUM_THREADS="7")
        counters = await worker.counters()
        assert counters["threads"] == "7"
        assert counters["pid"] != os.getpid()
        await worker.close()
        await gone(counters["pid"])
        await worker.close()  # of one that is gone already: nothing

    run(scenario())


def test_calls_of_one_worker_run_side_by_side():
    async def scenario():
        worker = await rollout_worker()
        waiting = asyncio.ensure_future(worker.generate("wait"))
        assert await worker.generate("release") == "release"
        assert await waiting == "wait"
        await worker.close()

    run(scenario())


def test_a_worker_that_is_full_of_requests_still_hears_an_interrupt():
    async def scenario():
        worker = await rollout_worker(max_requests=8)
        waiting = [asyncio.ensure_future(worker.generate("wait")) for _ in range(8)]
        assert await worker.interrupt("wait") is True
        assert await asyncio.gather(*waiting) == ["wait"] * 8
        await worker.close()

    run(scenario())


def test_a_worker_that_hangs_is_ended_by_closing_it():
    async def scenario():
        worker = await rollout_worker()
        pid = (await worker.counters())["pid"]
        waiting = asyncio.ensure_future(worker.generate("wait"))
        os.kill(pid, signal.SIGSTOP)
        await worker.close()
        with pytest.raises(WorkerLost):
            await waiting
        await gone(pid)

    run(scenario())


def test_a_users_mistake_arrives_as_itself_from_a_call_and_from_the_start():
    async def scenario():
        worker = await rollout_worker()
        with pytest.raises(DataError, match="the prompt is too long") as caught:
            await worker.update_weights(DataError("the prompt is too long"))
        assert caught.value.__cause__ is None
        await worker.close()

        def mistaken():
            raise DataError("no such engine")

        with pytest.raises(DataError, match="no such engine") as caught:
            await start_rollout_worker(
                1, RolloutWorker, mistaken, environment={}, max_requests=8, **RESOURCES
            )
        assert caught.value.__cause__ is None

    run(scenario())


def test_any_other_error_keeps_its_type_and_where_it_came_from():
    async def scenario():
        worker = await rollout_worker()
        with pytest.raises(ZeroDivisionError, match="update_weights"):
            await worker.update_weights(ZeroDivisionError("by zero"))
        await worker.close()

    run(scenario())


def test_running_out_of_memory_says_what_to_lower():
    async def scenario():
        worker = await rollout_worker()
        with pytest.raises(ClusterError, match="worker 0 ran out of memory.*rollout.kv_cache_mb"):
            await worker.update_weights(MemoryError("Unable to allocate 8 TiB"))
        await worker.close()

    run(scenario())


def test_every_way_to_run_out_of_memory_is_known():
    import numpy
    import torch

    for allocate in (lambda: numpy.empty(1 << 50), lambda: torch.empty(1 << 50)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_killed_worker_is_lost_to_the_call_that_runs_and_to_later_ones():
    async def scenario():
        worker = await rollout_worker()
        waiting = asyncio.ensure_future(worker.generate("wait"))
        pid = (await worker.counters())["pid"]
        os.kill(pid, signal.SIGKILL)
        for call in (waiting, worker.generate("more"), worker.counters()):
            with pytest.raises(WorkerLost, match="rollout worker 0 died"):
                await call

    run(scenario())


def test_a_worker_that_dies_while_it_is_built_ends_the_start_with_one_line():
    def dies():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ClusterError, match="rollout worker 3 died.*if memory ran out") as caught:
        run(
            start_rollout_worker(
                3, RolloutWorker, dies, environment={}, max_requests=8, **RESOURCES
            )
        )
    assert "\n" not in str(caught.value)


def test_every_rank_is_called_and_rank_0_answers():
    async def scenario():
        ranks = await learner_ranks(2)
        assert (await ranks.publish(4)).startswith("4 of rank 0")
        await ranks.close()

    run(scenario())


def test_ranks_meet_on_rank_0s_node_and_one_alone_meets_nobody():
    async def scenario():
        pair, alone = await learner_ranks(2), await learner_ranks(1)
        rendezvous = await pair.call(Rank.export, "")
        assert rendezvous.startswith(f"tcp://{ray.util.get_node_ip_address()}:")
        assert await alone.call(Rank.export, "") is None
        await pair.close()
        await alone.close()

    run(scenario())


def test_an_optimiser_step_makes_the_next_version_and_adds_to_the_report():
    async def scenario():
        ranks = await learner_ranks(1)
        phase = await ranks.begin(OptimizerConfig(), num_steps=50)
        update = await phase.forward_backward(TrainBatch(7, ()), None)
        stepped = await update.apply()
        await ranks.close()
        return stepped

    stepped = run(scenario())
    assert stepped.version == 8
    assert stepped.metrics == {"loss": 1.0, "step": 7, "of": 50}


def test_a_dead_rank_ends_the_call_though_the_others_wait_for_it_and_closing_ends_those():
    async def scenario():
        ranks = await learner_ranks(2)
        pid = int((await ranks.publish(0)).rpartition(" ")[2])
        with pytest.raises(ClusterError, match="learner rank 1 died"):
            await ranks.publish("hang")
        assert is_alive(pid), "rank 0 waits for ever"
        await ranks.close()
        await gone(pid)

    run(scenario())


def test_a_class_is_imported_only_where_it_is_called():
    late = LateClass("no_such_module:Nothing")
    with pytest.raises(ModuleNotFoundError):
        late()
    assert LateClass("fractions:Fraction")(6, denominator=4) == 1.5


def test_an_actor_that_no_resource_is_asked_for_starts_on_a_full_cluster():
    async def scenario():
        actors = [
            start_actor(worker_class(), dict, environment={}, **RESOURCES)
            for _ in range(os.cpu_count() + 1)
        ]
        for actor in actors:
            await result_of(actor.ready.remote(), ClusterError, "an actor")
        for actor in actors:
            await RolloutActor(actor, 0).close()

    run(scenario())
