"""Evaluation: every prompt is sampled to its end, whatever becomes of workers and segments."""

import asyncio
import functools
from dataclasses import replace

from paceline.controller.groups.buffer import WorkerLost
from paceline.controller.groups.evaluation import Evaluator, accuracy
from paceline.controller.groups.generation import Rollouts, sample_to_end
from tests.controller.builders import make_prompt
from tests.controller.engines.fake_workers import tokens_of


class Engine:
    """Adds a token a segment until there are three; every fifth call finds the worker dead."""

    def __init__(self):
        self.calls = 0
        self.requests = []

    async def __call__(self, request):
        self.calls += 1
        self.requests.append(request)
        await asyncio.sleep(0)
        if self.calls % 5 == 0:
            raise WorkerLost
        length = len(request.partial[0].token_ids) + 1 if request.partial else 1
        return (tokens_of(length, reason="stop" if length == 3 else "abort"),)


async def grade(prompt, texts):
    return [float(len(text)) for text in texts]


def evaluator(engine):
    def rollouts(sampling, num_samples, stream):
        return Rollouts(
            sample=functools.partial(sample_to_end, engine),
            grade=grade,
            decode=lambda token_ids: "x" * len(token_ids),
            sampling=sampling,
            num_samples=num_samples,
            seed=0,
            stream=stream,
        )

    return Evaluator(rollouts, max_tokens=8, stop_token_ids=(1,))


def test_every_prompt_is_sampled_to_its_end_though_weights_change_and_workers_die():
    engine = Engine()
    samples = asyncio.run(evaluator(engine).greedy([make_prompt(i) for i in range(7)]))
    assert engine.calls > 21
    assert [sample.num_tokens for sample in samples] == [3] * 7
    assert accuracy(samples) == 3.0
    assert len({request.request_id for request in engine.requests}) == engine.calls


def test_two_evaluations_ask_for_the_same_samples():
    engines = Engine(), Engine()
    for engine in engines:
        asyncio.run(evaluator(engine).sampled([make_prompt(i) for i in range(2)]))
    asked = [[replace(request, partial=()) for request in engine.requests] for engine in engines]
    assert asked[0] == asked[1]
    assert asked[0][0].sampling.temperature == 1.0
