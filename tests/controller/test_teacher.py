"""The teacher's side of a rollout: asked until it answers, joined to the samples."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from paceline.configs.vocabulary import SamplingParameters
from paceline.controller.buffer import Work
from paceline.controller.generation import Rollouts
from paceline.controller.parts import WorkerLost
from paceline.controller.routing import demand_of
from paceline.controller.teacher import FIXED, FixedWeightsActor, Teacher
from tests.controller.builders import make_completion, make_prompt


def scored(request):
    return tuple(
        replace(c, logprobs=np.arange(len(c.token_ids), dtype=np.float32)) for c in request.partial
    )


def test_a_lost_or_slow_worker_is_asked_again_about_the_same_samples():
    asked = []

    async def generate(request):
        asked.append(request)
        if len(asked) == 1:
            raise WorkerLost
        if len(asked) == 2:
            return tuple(replace(c, finish_reason="abort") for c in request.partial)
        return scored(request)

    completions = [make_completion(0, 3), make_completion(0, 5)]
    found = asyncio.run(Teacher(generate)(make_prompt(1), completions))
    assert [values.tolist() for values in found] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert len({request.request_id for request in asked}) == 3
    assert all(request.scores and request.partial == tuple(completions) for request in asked)


def test_what_is_scored_weighs_as_much_context_as_it_has():
    requests = []

    async def generate(request):
        requests.append(request)
        return scored(request)

    asyncio.run(Teacher(generate)(make_prompt(1), [make_completion(0, 3), make_completion(0, 5)]))
    load = demand_of(requests[0]).load
    assert (load.samples, load.tokens) == (2, 2 * 3 + 3 + 5)


def test_samples_carry_what_the_teacher_thinks_of_their_tokens():
    async def sample(request):
        return (make_completion(0, 2), make_completion(0, 4))

    async def grade(prompt, texts):
        return [1.0, 0.0]

    async def teach(prompt, completions):
        return [np.full(len(c.token_ids), -0.5, dtype=np.float32) for c in completions]

    rollouts = Rollouts(sample, grade, str, SamplingParameters(), 2, seed=0, teach=teach)
    group = asyncio.run(rollouts(Work(4, make_prompt(4))))
    assert [t.reward for t in group.trajectories] == [1.0, 0.0]
    for trajectory in group.trajectories:
        expected = np.where(trajectory.loss_mask, -0.5, 0.0)
        np.testing.assert_array_equal(trajectory.teacher_logprobs, expected)
    assert group.num_bytes > sum(9 * len(t.token_ids) for t in group.trajectories)


def test_a_teacher_acknowledges_the_one_version_it_has():
    actor = FixedWeightsActor(None, 0)
    assert asyncio.run(actor.update_weights(FIXED)) == (FIXED.version, FIXED.checksum)
    with pytest.raises(AssertionError, match="not trained"):
        asyncio.run(actor.update_weights(replace(FIXED, version=1)))
