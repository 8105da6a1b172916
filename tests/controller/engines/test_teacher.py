"""The teacher's side of a rollout: asked until it answers, joined to the samples."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from paceline.configs.errors import ClusterError, ConfigError, ModelError
from paceline.configs.load import load_config
from paceline.configs.vocabulary import SamplingParameters, UnfinishedGroup
from paceline.controller.engines.routing import demand_of
from paceline.controller.engines.teacher import FIXED, MAX_FRUITLESS, FixedWeightsActor, Teacher
from paceline.controller.groups.buffer import Work, WorkerLost
from paceline.controller.groups.generation import Rollouts
from paceline.learner.model.model import require_same_vocabulary
from tests.controller.builders import make_completion, make_prompt
from tests.controller.engines.fake_workers import FakeWorker, pool_of
from tests.controller.virtual_time import run_virtually


def scored(request):
    return tuple(
        replace(c, logprobs=np.arange(len(c.token_ids), dtype=np.float32)) for c in request.partial
    )


def taken_back(completion):
    return replace(completion, finish_reason="abort")


def test_what_a_lost_or_slow_worker_did_not_score_is_asked_again():
    asked = []

    async def generate(request):
        asked.append(request)
        if len(asked) == 1:
            raise WorkerLost
        answers = scored(request)
        return (taken_back(answers[0]), *answers[1:]) if len(asked) == 2 else answers

    short, long = make_completion(0, 3), make_completion(0, 5)
    found = asyncio.run(Teacher(generate)(make_prompt(1), [short, long]))
    assert [values.tolist() for values in found] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert [request.partial for request in asked] == [(short, long), (short, long), (short,)]
    assert all(request.scores for request in asked)
    assert len({request.request_id for request in asked}) == 3


def test_a_teacher_that_never_has_enough_time_ends_the_run_with_one_line():
    asked = []

    async def generate(request):
        asked.append(request)
        return tuple(taken_back(completion) for completion in request.partial)

    with pytest.raises(ClusterError, match="none of 1 completions.*raise it, or") as caught:
        asyncio.run(Teacher(generate)(make_prompt(1), [make_completion(0, 3)]))
    assert len(asked) == MAX_FRUITLESS
    assert len(str(caught.value).splitlines()) == 1


def test_a_dead_teacher_is_replaced_and_the_score_is_not_lost():
    async def scenario():
        first, spare = FakeWorker(), FakeWorker()
        pool = pool_of([first], [spare], section="teacher")
        await pool.update_weights(FIXED)
        first.dead = True
        found = await Teacher(pool.generate)(make_prompt(1), [make_completion(0, 3)])
        assert [len(values) for values in found] == [3]
        assert len(spare.requests) == 1 and spare.version == FIXED.version
        await pool.close()

    run_virtually(scenario())


def test_messages_about_a_teachers_workers_name_its_section():
    async def scenario():
        worker = FakeWorker()
        pool = pool_of([worker], max_restarts=0, section="teacher")
        await pool.update_weights(FIXED)
        worker.dead = True
        with pytest.raises(ClusterError, match="teacher worker 0 died.*teacher.max_restarts"):
            await Teacher(pool.generate)(make_prompt(1), [make_completion(0, 3)])

    run_virtually(scenario())


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


def test_teacher_and_grader_look_at_samples_at_the_same_time():
    async def scenario():
        both = asyncio.Barrier(2)

        async def sample(request):
            return (make_completion(0, 2),)

        async def grade(prompt, texts):
            await both.wait()
            return [1.0]

        async def teach(prompt, completions):
            await both.wait()
            return [np.zeros(2, dtype=np.float32)]

        rollouts = Rollouts(sample, grade, str, SamplingParameters(), 1, seed=0, teach=teach)
        return await asyncio.wait_for(rollouts(Work(4, make_prompt(4))), 5)

    assert asyncio.run(scenario()).trajectories[0].teacher_logprobs is not None


def test_unfinished_samples_are_not_shown_to_a_teacher():
    async def sample(request):
        return (make_completion(0, 2), replace(make_completion(0, 2), finish_reason="segment"))

    async def never(*_):
        raise AssertionError

    rollouts = Rollouts(sample, never, str, SamplingParameters(), 2, seed=0, teach=never)
    assert isinstance(asyncio.run(rollouts(Work(4, make_prompt(4)))), UnfinishedGroup)


def folder_with_vocabulary(folder, size):
    folder.mkdir()
    config = {"model_type": "qwen3", "vocab_size": size}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    policy, other, equal = (
        folder_with_vocabulary(tmp_path / name, size)
        for name, size in (("policy", 128), ("other", 129), ("equal", 128))
    )
    require_same_vocabulary(equal, policy)
    with pytest.raises(ModelError, match="embeds 129 tokens, the policy 128"):
        require_same_vocabulary(other, policy)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["algorithm={type: distillation}"], "needs a teacher"),
        (
            [
                "algorithm={type: distillation}",
                "teacher={path: wiser}",
                "rollout.sampling.temperature=0.7",
            ],
            "at temperature 1",
        ),
    ],
)
def test_a_distillation_without_a_fitting_teacher_is_refused(overrides, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_config("quickstart", overrides)
