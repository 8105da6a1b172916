"""The environment every test runs in, set before anything imports torch or vLLM; its reasons."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import Phase, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from paceline.configs.imports import imports_uncollected
from paceline.rollout.process_environment import engine_environment
from tests.reasons import mark_reasons, unit_of
from tests.redis_server import INSTALL, find_program

os.environ.update(engine_environment(on_gpu=False))

# a busy machine is no failure
settings.register_profile("ci", max_examples=30, deadline=None)
settings.register_profile("nightly", max_examples=400, deadline=None)
# of scripts/mutants.py: the same examples every time, and a failure is all it wants
settings.register_profile("mutants", derandomize=True, deadline=None, phases=[Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


class UnitScheduling(LoadScopeScheduling):
    """Hands a process of `pytest -n` all tests of a unit."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> UnitScheduling:
    """Distribute by units; the groups of pytest-xdist 3.8 are lost in pytest 9.2."""
    return UnitScheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import everything without looking through it for garbage."""
    with imports_uncollected():
        return (yield)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the reasons why it takes long; whole runs, the longest, come first."""
    for item in items:
        mark_reasons(item)
    items.sort(key=lambda item: item.get_closest_marker("run") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Say once that redis-server is missing, rather than in each test that needs it."""
    needing = sum(item.get_closest_marker("redis") is not None for item in session.items)
    if needing and not session.config.option.collectonly and find_program() is None:
        raise pytest.UsageError(
            f"{needing} of these tests need redis-server: {INSTALL}; "
            "leave them out with -m 'not redis'"
        )
