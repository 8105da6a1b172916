"""The self-check: an engine that serves other weights is found out."""

import asyncio

import pytest

from paceline.controller.wiring.self_check import check_greedy_tokens
from paceline.weights_sync.handle import WeightSyncError
from tests.controller.builders import make_completion, make_prompt


class FakePool:
    def __init__(self, num_workers):
        self.num_workers = num_workers
        self.requests = []

    async def generate_everywhere(self, request):
        self.requests.append(request)
        return [(make_completion(0, length=5),)] * self.num_workers


class FakeLearner:
    def __init__(self, mismatches=0):
        self.mismatches = mismatches
        self.groups = None

    async def greedy_mismatches(self, groups, tolerance):
        self.groups = groups
        return self.mismatches


def check(pool, learner):
    return asyncio.run(
        check_greedy_tokens(
            pool,
            learner,
            [make_prompt(0), make_prompt(1)],
            max_tokens=5,
            stop_token_ids=(1,),
            precision="float32",
            label="version 3",
        )
    )


def test_greedy_completions_of_every_worker_are_shown_to_the_learner():
    pool, learner = FakePool(num_workers=3), FakeLearner()
    assert check(pool, learner) == 2 * 3 * 5
    assert [request.sampling.temperature for request in pool.requests] == [0.0, 0.0]
    assert len(learner.groups) == 6
    for group in learner.groups:
        assert group.prompt.token_ids == (1, 2, 3)
        assert [sample.completion.token_ids.tolist() for sample in group.samples] == [[*range(5)]]


def test_one_token_that_is_not_the_learners_ends_the_run():
    with pytest.raises(WeightSyncError, match="version 3: 1 greedy tokens"):
        check(FakePool(num_workers=1), FakeLearner(mismatches=1))


def test_where_every_worker_died_over_it_nothing_was_checked():
    learner = FakeLearner()
    assert check(FakePool(num_workers=0), learner) == 0
    assert learner.groups is None
