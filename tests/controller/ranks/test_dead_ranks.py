"""Who is named when ranks fail together, with actors whose answers come in a given order."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from paceline.configs.errors import ClusterError
from paceline.controller.ranks.learner_ranks import LearnerRanks


async def fails(error):
    raise error


def actor(call, status):
    """An actor whose ``call`` and ``status`` are what these functions return."""
    methods = {"call": call, "status": status}
    return SimpleNamespace(
        **{
            name: SimpleNamespace(remote=lambda *_, answer=answer: answer())
            for name, answer in methods.items()
        }
    )


def lives():
    """A rank whose collective failed because its neighbour left."""
    return actor(
        call=lambda: fails(RuntimeError("connection closed by peer")),
        status=lambda: asyncio.sleep(0),
    )


def dies():
    """A rank of whose death Ray does not tell the call that runs, but whoever asks next."""
    return actor(call=asyncio.Event().wait, status=lambda: fails(RayActorError()))


@pytest.mark.parametrize("dead", [0, 1])
def test_the_dead_rank_is_named_and_not_the_error_of_its_neighbour(tmp_path, dead):
    async def scenario():
        actors = [lives(), lives()]
        actors[dead] = dies()
        ranks = LearnerRanks(actors, hang_seconds=60.0, reports=tmp_path)
        with pytest.raises(ClusterError, match=f"learner rank {dead} died") as caught:
            await ranks.publish(1)
        with pytest.raises(ClusterError) as again:
            await ranks.publish(1)
        assert again.value is caught.value

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_an_error_without_a_death_is_raised_as_it_is(tmp_path):
    async def scenario():
        ranks = LearnerRanks([lives(), lives()], hang_seconds=60.0, reports=tmp_path)
        with pytest.raises(RuntimeError, match="connection closed"):
            await ranks.publish(1)

    asyncio.run(asyncio.wait_for(scenario(), 30))
