"""Starting, joining and leaving a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import ray

from paceline.configs.errors import ClusterError
from paceline.configs.forecast.estimate import placement
from paceline.configs.schema.run import ClusterConfig, RunConfig

PROBE_SECONDS = 5.0
LOCAL_START_ATTEMPTS = 3
LOCAL_SYSTEM = {"worker_niceness": 0, "prestart_worker_first_driver": False}
"""Ray starts workers at niceness 15. On a machine with other work, engines and learner would get
what that leaves of a core, while the process that waits for them keeps its priority. It also starts
an idle one for every CPU beforehand, which a run's actors, with an environment each, cannot use."""
QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[None]:
    """Join the configured cluster or the one a submitted job runs in, else start a local one.

    Only a cluster that was started here is stopped at the end.

    Raises:
        ClusterError: there is no cluster at the address.
    """
    # Ray tells GPU-less processes to hide GPUs by itself; the warning about it is noise here.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            probe(address)
            ray.init(address=address, **QUIET)
        else:
            start_local_cluster(config)
    except Exception as error:  # Ray raises bare ones, where a node is slow to come up for example
        reason = " ".join(str(error).split())[:200]
        where = f"no Ray cluster at {address}" if address else "a local Ray cluster did not start"
        raise ClusterError(
            f"{where} ({type(error).__name__}: {reason}): start one with `ray start --head`, "
            "correct cluster.address, export RAY_AUTH_MODE=token if it wants a token, or leave the "
            "address out to run locally"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def start_local_cluster(config: ClusterConfig) -> None:
    """Start a private cluster; try again where a busy machine outlasts Ray's fixed 30 seconds."""
    for attempts_left in reversed(range(LOCAL_START_ATTEMPTS)):
        try:
            # Without an address Ray would join whatever cluster was last started on this machine.
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=config.object_store_mb << 20,
                _system_config=LOCAL_SYSTEM,
                **QUIET,
            )
            return
        except Exception as error:
            ray.shutdown()
            if not attempts_left:
                raise
            logger.warning("Ray did not start (%s), trying again", " ".join(str(error).split()))


def probe(address: str) -> None:
    """Fail at once where nothing listens: Ray itself retries a dead address for minutes.

    Raises:
        OSError: nothing accepts connections there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        with socket.create_connection((host, int(port)), timeout=PROBE_SECONDS):
            pass


def require_resources(config: RunConfig) -> None:
    """Check that the cluster could ever hold the run's actors.

    Raises:
        ClusterError: it has fewer CPUs or GPUs than the run reserves.
    """
    found = placement(config)
    wanted = {"GPU": found.gpus, "CPU": found.cpus}
    teachers = f", {found.num_teacher_workers} teacher workers" if config.teacher else ""
    available = ray.cluster_resources()
    for kind, count in wanted.items():
        if count > available.get(kind, 0):
            raise ClusterError(
                f"the run reserves {count:g} {kind}s for {found.num_rollout_workers} rollout "
                f"workers{teachers} and {found.num_learner_ranks} learner ranks, the cluster has "
                f"{available.get(kind, 0):g}: lower them or join a larger cluster"
            )
