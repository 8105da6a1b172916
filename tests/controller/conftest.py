"""One real Ray for all tests of this folder that need it."""

from __future__ import annotations

import pytest

from paceline.configs.schema.run import ClusterConfig
from paceline.controller.cluster.ray_cluster import ray_cluster


@pytest.fixture(scope="package")
def local_ray():
    """A cluster of its own, which takes seconds to start; tests leave no actor in it."""
    with ray_cluster(ClusterConfig(object_store_mb=80)):
        yield
