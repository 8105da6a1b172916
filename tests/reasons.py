"""Why tests take long: what they start, by the fixtures that start it.

A test that starts such a thing by itself says so with a mark of the same name.
"""

from __future__ import annotations

from pathlib import Path

import pytest

FIXTURES = {
    "engine": {"drafters", "engine", "engine_and_reference", "engines", "fleet", "subject"},
    "ranks": {"deepspeed_processes", "on_ranks", "processes", "rank_processes"},
    "run": {"local_ray", "ray_cluster"},
    "redis": {"own_redis", "redis_server", "shared_redis"},
}
"""Fixtures that start vLLM, ranks' processes, Ray or Redis."""

REASONS = tuple(FIXTURES)
SHARING = ("tests/controller/verify", "tests/learner/engines", "tests/rollout")
"""Folders whose modules share engines or ranks' processes."""
_INTEGRATION = Path(__file__).parent / "integration"


def mark_reasons(item: pytest.Item) -> None:
    """Add the mark of everything that ``item``'s fixtures and parameters start."""
    fixtures = set(getattr(item, "fixturenames", ()))
    callspec = getattr(item, "callspec", None)
    parameters = callspec.params.values() if callspec else ()
    for reason, starting in FIXTURES.items():
        if fixtures & starting or any(isinstance(p, str) and p == reason for p in parameters):
            item.add_marker(reason)
    if item.path.is_relative_to(_INTEGRATION):
        item.add_marker("run")


def unit_of(nodeid: str) -> str:
    """Return the name of the tests that run in one process with this one: mostly its module's.

    What a module's fixtures start is then started once; so are the engines and ranks of a folder.
    """
    module = nodeid.partition("::")[0]
    folders = (folder for folder in SHARING if module.startswith(f"{folder}/"))
    return next(folders, module)
