"""One small trained model behind real engines, for all tests of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def subject():
    from vllm.v1.engine import core

    from paceline.controller.verify.speculation import subject_of

    # An engine that ends would take the process's parallel groups with it, and tests beside these
    # have engines of their own.
    core.cleanup_dist_env_and_memory = lambda: None
    with subject_of(None, seed=0, quick=True) as found:
        yield found
