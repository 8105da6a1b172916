"""Runs on a Ray cluster that is there already, and beside one."""

from __future__ import annotations

import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.integration.commands import PATIENCE_SECONDS, SCRIPTS, Command, run, run_in
from tests.integration.conftest import train

pytestmark = pytest.mark.timeout(3 * PATIENCE_SECONDS)

NUM_CPUS = 77
"""No machine of ours: who names this number has asked the test's cluster."""


@dataclass(frozen=True)
class RayCluster:
    """A cluster that the test started: its addresses, the environment that reaches it, and its
    processes."""

    address: str
    dashboard: str
    environment: dict[str, str]
    head: Command


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory) -> Iterator[RayCluster]:
    """A cluster of its own on free ports, with a token of its own, whatever else runs here.

    ``ray stop`` would end every cluster of the machine: this one ends with its process.
    """
    root = tmp_path_factory.mktemp("cluster")
    token = root / "token"
    token.write_text(secrets.token_hex(32))
    folder = tempfile.mkdtemp(prefix="pl-")  # short: it is part of the names of Unix sockets
    environment = {
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    gcs, dashboard, *others = free_ports(6)
    names = (
        "dashboard-agent-listen",
        "dashboard-agent-grpc",
        "metrics-export",
        "ray-client-server",
    )
    head = [
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        *(f"--{name}-port={port}" for name, port in zip(names, others, strict=True)),
        f"--num-cpus={NUM_CPUS}",
        f"--object-store-memory={100 * 2**20}",
    ]
    try:
        with Command(*head, cwd=root, environment=environment, program="ray") as command:
            command.wait_until(lambda: "Ray runtime started" in command.output, "Ray was up")
            command.wait_until(lambda: is_listening(dashboard), "its dashboard answered")
            url = f"http://127.0.0.1:{dashboard}"
            yield RayCluster(f"127.0.0.1:{gcs}", url, environment, command)
            command.process.terminate()
            command.process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_submitted_job_is_a_whole_run(ray_cluster, tmp_path):
    arguments = train("job", "loop.num_steps=3", "data.num_held_out=8")
    arguments[arguments.index("output_dir=runs")] = f"output_dir={tmp_path / 'runs'}"
    submit = ["job", "submit", "--address", ray_cluster.dashboard, "--"]
    ended = run(
        *submit,
        str(SCRIPTS / "paceline"),
        *arguments,
        cwd=tmp_path,
        environment=ray_cluster.environment,
        program="ray",
    )
    assert ended.code == 0, ended.output + ended.errors
    assert "succeeded" in ended.output
    summary = run_in(tmp_path, "job").summary
    assert (summary.status, summary.steps) == ("finished", 3)
    assert (tmp_path / "runs" / "job" / "final" / "model.safetensors").exists()
    # The cluster lives on; of the job nothing is left in it.
    ray_cluster.head.wait_until(lambda: not ray_cluster.head.actors(), "the job's actors were gone")


def test_a_run_joins_the_cluster_at_its_address(ray_cluster, tmp_path):
    ended = run(
        *train("joined", "rollout.cpus_per_worker=1000", f"cluster.address={ray_cluster.address}"),
        cwd=tmp_path,
        environment=ray_cluster.environment,
    )
    assert ended.code == 2, ended.errors
    assert f"the cluster has {NUM_CPUS}" in ended.errors


def test_a_run_without_an_address_leaves_other_clusters_alone(ray_cluster, tmp_path):
    """Ray alone would join the cluster that was started last on the machine."""
    ended = run(
        *train("beside", "rollout.cpus_per_worker=1000"),
        cwd=tmp_path,
        environment=ray_cluster.environment,
    )
    assert ended.code == 2, ended.errors
    assert "reserves 1000 CPUs" in ended.errors
    assert f"the cluster has {NUM_CPUS}" not in ended.errors
