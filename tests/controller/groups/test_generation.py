"""What fills a group: seeds of its own, rewards of finished samples only, faults that are kept."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from paceline.configs.errors import GraderError
from paceline.configs.vocabulary import SamplingParameters, UnfinishedGroup
from paceline.controller.data.rendering import Demonstration
from paceline.controller.groups.buffer import Work, WorkerLost
from paceline.controller.groups.generation import (
    Demonstrations,
    Rollouts,
    request_seed,
    sample_to_end,
)
from tests.controller.builders import make_completion, make_prompt
from tests.controller.engines.fake_workers import request, tokens_of

SAMPLING = SamplingParameters(temperature=0.7, max_tokens=4)


class Engine:
    """Answers every request with the given finish reasons, and remembers the requests."""

    def __init__(self, *finish_reasons):
        self.finish_reasons = finish_reasons or ("stop", "stop")
        self.requests = []

    async def __call__(self, request):
        self.requests.append(request)
        return tuple(
            replace(make_completion(version=3), finish_reason=reason)
            for reason in self.finish_reasons
        )


async def all_right(prompt, texts):
    return [1.0] * len(texts)


async def broken(prompt, texts):
    raise GraderError("the grader fell over")


def rollouts(engine, grade=all_right, **settings):
    return Rollouts(
        sample=engine,
        grade=grade,
        decode=lambda token_ids: "-".join(map(str, token_ids)),
        sampling=SAMPLING,
        num_samples=2,
        **{"seed": 7, **settings},
    )


def group_of(part, group_id=5):
    return asyncio.run(part(Work(group_id, make_prompt(group_id))))


def test_a_group_holds_what_was_sampled_graded_and_by_which_version():
    group = group_of(rollouts(Engine()))
    assert (group.group_id, group.prompt, group.fault) == (5, make_prompt(5), None)
    assert [sample.text for sample in group.samples] == ["0-1-2-3"] * 2
    assert group.rewards.tolist() == [1.0, 1.0]
    assert group.oldest_version == 3
    assert group.samples[0].completion.token_ids.tolist() == [0, 1, 2, 3]


def test_a_sample_that_was_cut_off_gets_no_reward():
    group = group_of(rollouts(Engine("stop", "length", "stop")))
    assert group.rewards.tolist() == [1.0, 0.0, 1.0]


def test_a_sample_that_was_cut_off_is_graded_where_that_is_wanted():
    group = group_of(rollouts(Engine("length", "stop"), require_finish=False))
    assert group.rewards.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("reason", ["segment", "abort"])
def test_a_group_with_an_unfinished_sample_comes_back_whole_and_ungraded(reason):
    async def never(prompt, texts):
        raise AssertionError("half a sample was graded")

    group = group_of(rollouts(Engine("stop", reason), never))
    assert isinstance(group, UnfinishedGroup)
    assert group.group_id == 5
    assert [each.finish_reason for each in group.partial] == ["stop", reason]


def test_a_turn_is_asked_for_with_what_there_is_and_its_own_budget():
    engine = Engine()
    partial = (tokens_of(4), tokens_of(3, reason="segment"))
    work = Work(5, make_prompt(5), partial=partial)
    asyncio.run(rollouts(engine, segment_tokens=3)(work))
    group_of(rollouts(engine))
    continued, begun = engine.requests
    assert (continued.partial, continued.segment_tokens) == (partial, 3)
    assert (begun.partial, begun.segment_tokens) == ((), 0)
    assert continued.seed == begun.seed


def test_sampling_to_the_end_asks_until_every_sample_is_finished():
    answers = iter(
        [
            (tokens_of(2, reason="abort"), tokens_of(2, reason="stop")),
            (tokens_of(4, reason="segment"), tokens_of(2, reason="stop")),
            (tokens_of(5, reason="length"), tokens_of(2, reason="stop")),
        ]
    )
    asked = []

    async def sample(segment):
        asked.append(segment)
        return next(answers)

    completions = asyncio.run(sample_to_end(sample, request("a", 2)))
    assert [len(each.token_ids) for each in completions] == [5, 2]
    assert [[len(each.token_ids) for each in segment.partial] for segment in asked] == [
        [],
        [2, 2],
        [4, 2],
    ]
    assert len({segment.request_id for segment in asked}) == 3


def test_a_grader_error_ends_the_run():
    with pytest.raises(GraderError, match="fell over"):
        group_of(rollouts(Engine(), broken))


def test_a_grader_error_marks_the_group_where_it_is_to_be_dropped(caplog):
    group = group_of(rollouts(Engine(), broken, drop_on_error=True))
    assert group.fault == "grader_error"
    assert group.rewards.tolist() == [0.0, 0.0]
    assert "dropping group 5: the grader fell over" in caplog.text


@pytest.mark.parametrize("drop_on_error", [False, True])
def test_other_errors_are_never_a_reason_to_drop(drop_on_error):
    async def lost(request):
        raise WorkerLost

    with pytest.raises(WorkerLost):
        group_of(rollouts(lost, drop_on_error=drop_on_error))


def test_a_repeated_attempt_draws_the_same_samples_under_another_name():
    engine = Engine()
    part = rollouts(engine)
    group_of(part)
    group_of(part)
    first, second = engine.requests
    assert first.seed == second.seed
    assert first.request_id != second.request_id
    assert (first.sampling, first.num_samples) == (SAMPLING, 2)


def test_a_resumed_run_draws_the_samples_that_the_interrupted_one_would_have():
    engines = Engine(), Engine()
    group_of(rollouts(engines[0]), group_id=9)
    part = rollouts(engines[1])
    group_of(part, group_id=4)
    group_of(part, group_id=9)
    assert engines[0].requests[-1].seed == engines[1].requests[-1].seed


def test_every_run_stream_and_group_has_a_seed_of_its_own():
    seeds = {
        request_seed(run, stream, index)
        for run in range(3)
        for stream in range(3)
        for index in range(1000)
    }
    assert len(seeds) == 9000
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_seed_is_the_same_in_every_process_and_release():
    assert request_seed(0, 0, 0) == 2968811710
    assert request_seed(1, 2, 3) == 3822189696


def demonstration(text, *token_ids):
    return Demonstration(text, np.array(token_ids, dtype=np.int32))


def test_a_demonstration_is_trained_on_but_was_sampled_by_nobody():
    part = Demonstrations(lambda prompt: (demonstration("ab", 7, 8, 1),))
    (sample,) = group_of(part).samples
    assert sample.completion.token_ids.tolist() == [7, 8, 1]
    assert sample.oldest_version is None
    assert sample.completion.finish_reason == "stop"
    assert (sample.reward, sample.text) == (1.0, "ab")
    assert not sample.completion.logprobs.any()


def test_of_a_pair_the_first_is_the_better_one():
    pair = demonstration("a", 7, 1), demonstration("bb", 8, 8, 1)
    part = Demonstrations(lambda prompt: pair)
    chosen, rejected = group_of(part).samples
    assert (chosen.reward, rejected.reward) == (1.0, 0.0)
    assert rejected.completion.token_ids.tolist() == [8, 8, 1]
