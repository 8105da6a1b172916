"""Joining, starting and leaving a Ray cluster (Ray itself is replaced; see also integration)."""

from __future__ import annotations

import contextlib
import os
import socket
import time

import pytest
import ray

from paceline.configs.errors import ClusterError
from paceline.configs.load import load_config
from paceline.configs.schema.run import ClusterConfig
from paceline.controller.cluster import ray_cluster


class FakeRay:
    """Remembers how it was started; has the given resources."""

    def __init__(self, error=None, **resources):
        self.error, self.resources = error, resources
        self.started_with, self.num_shutdowns = [], 0

    def init(self, **arguments):
        self.started_with.append(arguments)
        if self.error:
            raise self.error

    def shutdown(self):
        self.num_shutdowns += 1

    def cluster_resources(self):
        return self.resources


@pytest.fixture
def start_fake(monkeypatch):
    """Puts a fake in Ray's place; the environment names no cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def start(*arguments, **resources):
        fake = FakeRay(*arguments, **resources)
        monkeypatch.setattr(ray_cluster, "ray", fake)
        return fake

    return start


@pytest.fixture
def listening_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def unused_port():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def enter(**settings):
    with ray_cluster.ray_cluster(ClusterConfig(**settings)):
        pass


def test_without_an_address_a_cluster_of_its_own_is_started_whatever_else_runs(start_fake):
    fake = start_fake()
    enter(object_store_mb=100)
    (arguments,) = fake.started_with
    assert arguments["address"] == "local"
    assert arguments["object_store_memory"] == 100 * 2**20


def test_a_configured_address_is_joined(start_fake, listening_port):
    fake = start_fake()
    enter(address=f"127.0.0.1:{listening_port}")
    (arguments,) = fake.started_with
    assert arguments["address"] == f"127.0.0.1:{listening_port}"
    assert "object_store_memory" not in arguments, "Ray refuses it of a cluster that runs already"


def test_a_submitted_job_joins_the_cluster_it_runs_in(start_fake, listening_port, monkeypatch):
    fake = start_fake()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening_port}")
    enter()
    assert fake.started_with[0]["address"] == f"127.0.0.1:{listening_port}"


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_listens_is_refused_at_once(start_fake, scheme):
    fake = start_fake()
    address = f"{scheme}127.0.0.1:{unused_port()}"
    began = time.monotonic()
    with pytest.raises(ClusterError, match=f"no Ray cluster at {address}.*ray start --head"):
        enter(address=address)
    assert time.monotonic() - began < 3 * ray_cluster.PROBE_SECONDS
    assert fake.started_with == []


@pytest.mark.parametrize("error", [ConnectionError, RuntimeError, ValueError, OSError])
def test_what_ray_cannot_do_is_one_line(start_fake, error):
    start_fake(error("could not\n  read\tthe address"))
    with pytest.raises(ClusterError, match="could not read the address") as caught:
        enter()
    assert "\n" not in str(caught.value)


def test_a_cluster_is_left_however_its_block_ends(start_fake):
    fake = start_fake()

    def fails():
        with ray_cluster.ray_cluster(ClusterConfig()):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    enter()
    assert fake.num_shutdowns == 2


@pytest.mark.parametrize(
    ("overrides", "resources", "complaint"),
    [
        (["rollout.num_workers=3", "rollout.cpus_per_worker=2"], {"CPU": 4}, "6 CPUs.*has 4"),
        (["rollout.gpus_per_worker=1", "learner.gpus_per_rank=1"], {"GPU": 1}, "2 GPUs.*has 1"),
        (["learner.gpus_per_rank=1"], {"CPU": 64}, "1 GPUs.*has 0"),
        (["teacher={path: wiser, gpus_per_worker: 1}"], {"CPU": 64}, "1 teacher workers.*has 0"),
    ],
)
def test_more_than_the_cluster_has_is_refused_before_anything_waits(
    start_fake, overrides, resources, complaint
):
    start_fake(**resources)
    with pytest.raises(ClusterError, match=complaint):
        ray_cluster.require_resources(load_config("debug", overrides))


def test_what_the_cluster_just_has_is_enough(start_fake):
    start_fake(CPU=2.0)
    ray_cluster.require_resources(load_config("debug", ["rollout.cpus_per_worker=2"]))


def test_a_local_cluster_that_is_slow_to_start_is_started_again(start_fake):
    fake = start_fake(Exception("The current node timed out during startup."))
    start = fake.init

    def second_time_lucky(**arguments):
        if fake.started_with:
            fake.error = None
        start(**arguments)

    fake.init = second_time_lucky
    with ray_cluster.ray_cluster(ClusterConfig()):
        assert len(fake.started_with) == 2


def test_a_local_cluster_that_never_starts_is_one_line(start_fake):
    fake = start_fake(Exception("The current node timed out during startup."))
    with (
        pytest.raises(ClusterError, match="a local Ray cluster did not start .*timed out"),
        ray_cluster.ray_cluster(ClusterConfig()),
    ):
        pass
    assert len(fake.started_with) == ray_cluster.LOCAL_START_ATTEMPTS


def test_workers_of_a_local_cluster_run_at_the_priority_of_the_run_itself(local_ray):
    @ray.remote(num_cpus=0)
    class Worker:
        def niceness(self):
            return os.nice(0)

    worker = Worker.remote()
    assert ray.get(worker.niceness.remote()) == os.nice(0)
    ray.kill(worker)
