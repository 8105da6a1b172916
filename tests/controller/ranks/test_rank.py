"""The calls that the controller knows of a rank are those that the learner's worker has."""

import inspect

import pytest

from paceline.controller.ranks.rank import Rank
from paceline.learner.worker import LearnerWorker

CALLS = [name for name, member in vars(Rank).items() if inspect.isfunction(member)]


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("_")])
def test_the_worker_takes_every_call_with_the_same_arguments(name):
    expected = inspect.signature(getattr(Rank, name)).parameters.values()
    found = inspect.signature(getattr(LearnerWorker, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in found] == [
        (p.name, p.kind, p.default) for p in expected
    ]
