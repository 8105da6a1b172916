"""The environment every test runs in, set before anything imports torch or vLLM; its reasons."""

import os

import pytest
from hypothesis import Phase, settings

from paceline.rollout.process_environment import engine_environment
from tests.reasons import mark_reasons
from tests.redis_server import INSTALL, find_program

os.environ.update(engine_environment(on_gpu=False))

# a busy machine is no failure
settings.register_profile("ci", max_examples=30, deadline=None)
settings.register_profile("nightly", max_examples=400, deadline=None)
# of scripts/mutants.py: the same examples every time, and a failure is all it wants
settings.register_profile("mutants", derandomize=True, deadline=None, phases=[Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the reasons why it takes long; files with whole runs come first.

    Processes beside each other (`make test`) take a file at a time, so the short ones at the end
    keep both busy.
    """
    for item in items:
        mark_reasons(item)
    running = {item.path for item in items if item.get_closest_marker("run")}
    items.sort(key=lambda item: item.path not in running)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Say once that redis-server is missing, rather than in each test that needs it."""
    needing = sum(item.get_closest_marker("redis") is not None for item in session.items)
    if needing and not session.config.option.collectonly and find_program() is None:
        raise pytest.UsageError(
            f"{needing} of these tests need redis-server: {INSTALL}; "
            "leave them out with -m 'not redis'"
        )
