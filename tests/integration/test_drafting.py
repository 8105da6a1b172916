"""What one worker sampled, the others draft from, and so does a resumed run; all parts real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from paceline.configs.load import load_config
from paceline.configs.vocabulary import RolloutRequest, SamplingParameters
from paceline.controller.cluster.ray_cluster import ray_cluster
from paceline.controller.engines.routing import demand_of
from paceline.controller.observe.files.jsonl import read_lines
from paceline.controller.run.checkpoints import DRAFT_CORPUS
from paceline.controller.wiring.preparation import prepare
from paceline.controller.wiring.services import Services, started_services
from tests.integration.commands import PATIENCE_SECONDS, Command, run, run_in
from tests.integration.conftest import train

pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)

DRAFTING = "rollout.drafting={budget: none}"
NUM_TOKENS = 16


@contextlib.asynccontextmanager
async def services_of(
    root: Path, *overrides: str, saved: Path | None = None
) -> AsyncIterator[Services]:
    """Two drafting engines, which serve version 0 and know all that they are to know."""
    config = load_config("debug", ("rollout.num_workers=2", DRAFTING, *overrides))
    inputs = prepare(config, root / "initial")
    async with started_services(config, inputs) as services:
        if saved is not None:
            await services.load_draft_corpus(saved)
        await serve(services, 0)
        yield services


async def serve(services: Services, version: int) -> None:
    assert services.draft_publisher is not None
    await services.weights.push(await services.weights.publish(version))
    await services.draft_publisher.settled()


async def ask(services: Services, index: int, prompt: tuple[int, ...]) -> tuple[list[int], float]:
    """A greedy completion by one worker, and how many of its tokens the history gave."""
    worker = services.pool._seats[index].worker
    before = (await worker.counters())["num_accepted_history"]
    sampling = SamplingParameters(temperature=0.0, max_tokens=NUM_TOKENS)
    request = RolloutRequest(f"ask-{uuid.uuid4()}", prompt, sampling, 1, seed=0)
    (completion,) = await services.pool._generate(demand_of(request, only=index), request)
    after = (await worker.counters())["num_accepted_history"]
    return completion.token_ids.tolist(), after - before


def test_a_worker_drafts_from_what_another_sampled_from_files_and_from_what_was_saved(tmp_path):
    """A greedy completion that was sampled before is drafted nearly whole."""
    first, second, third = (101, 102, 61), (103, 104, 105, 61), (106, 107, 61)
    external = tmp_path / "external.jsonl"

    async def sampled_by_another() -> None:
        async with services_of(tmp_path) as services:
            expected, drafted = await ask(services, 0, first)
            assert drafted == 0
            await serve(services, 1)
            found, drafted = await ask(services, 1, first)
            assert found == expected
            assert drafted > NUM_TOKENS / 2
            tokens, _ = await ask(services, 0, second)
            external.write_text(json.dumps({"prompt_token_ids": second, "token_ids": tokens}))
            assert (await ask(services, 1, third))[1] == 0
            await services.save_draft_corpus(str(tmp_path / DRAFT_CORPUS))

    async def external_and_saved() -> None:
        drafts_from = f"rollout.drafting.corpus=[{external}]"
        async with services_of(tmp_path, drafts_from, saved=tmp_path / DRAFT_CORPUS) as services:
            for index in (0, 1):
                for prompt in (second, third):
                    assert (await ask(services, index, prompt))[1] > NUM_TOKENS / 2

    with ray_cluster(load_config("debug", ()).cluster):
        asyncio.run(sampled_by_another())
        asyncio.run(external_and_saved())


def test_a_killed_run_goes_on_warm(tmp_path):
    """Nearly greedy samples of the same prompts in every step repeat each other.

    A step that knows nothing can only draft from samples that are a few tokens ahead.
    """
    problems = [{"question": word, "answer": "x"} for word in "abcdefghij"]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    result = run_in(tmp_path, "run")

    def settings(num_steps: int) -> list[str]:
        return train(
            "run",
            f"loop.num_steps={num_steps}",
            "loop.max_lag=0",
            "data.num_held_out=2",
            "data.source={type: dataset, path: problems.jsonl}",
            "reward={type: exact}",
            "rollout.sampling.temperature=0.01",
            "rollout.num_workers=2",
            DRAFTING,
            "store={type: memory}",
            "checkpoint.every_steps=1",
            "observability.samples_per_step=8",
        )

    def drafted_share(step: int) -> float:
        """Of the tokens sampled for a step."""
        samples, _ = read_lines(result.folder.samples)
        drafted = [sum(sample["drafted"]) for sample in samples if sample["step"] == step]
        assert len(drafted) == 8
        return sum(drafted) / (8 * NUM_TOKENS)

    with Command(*settings(1000), cwd=tmp_path) as command:
        command.wait_until(lambda: result.has_done(3), "three steps were done")
        command.kill()
        command.wait_until_nothing_is_left()
    assert drafted_share(1) < 0.6
    ended = run(*settings(len(result.steps) + 1), "--resume", cwd=tmp_path)
    assert ended.code == 0, ended.errors
    assert "drafting starts cold" not in result.log
    resumed_after = int(result.log.rpartition("resuming after step ")[2].split()[0])
    assert drafted_share(resumed_after + 1) > 0.7
