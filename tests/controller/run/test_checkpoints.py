"""Checkpoints of a run: whole or not there, the newest kept, unreadable ones refused."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from paceline.configs.errors import CheckpointError
from paceline.controller.run.checkpoints import CheckpointFolder, RunState

STATE = RunState(
    step=3,
    feed={"position": 40, "kept_apart": "abc"},
    pending=(24, 31, 39),
    totals={"groups_trained": 24},
    seconds={"train": 1.5},
    warm_start={"steps": 10, "seconds": 2.0},
    before={"greedy": 0.5, "examples": [["text", 1.0]]},
)


async def write_shards(folder):
    Path(folder).mkdir()
    (Path(folder) / "shard-0").write_text("weights")


def save(root, *steps, keep=2, save_learner=write_shards, **others):
    folder = CheckpointFolder(root, keep)

    async def each():
        for step in steps:
            await folder.save(replace(STATE, step=step), {"learner": save_learner, **others})
        await folder.finish()

    asyncio.run(each())
    return folder


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_what_was_saved_is_what_is_resumed_from(tmp_path):
    found, folder = save(tmp_path / "checkpoints", 3, draft_corpus=write_shards).latest()
    assert found == STATE
    for part in ("learner", "draft_corpus"):
        assert (folder / part / "shard-0").read_text() == "weights"


def test_a_run_without_checkpoints_has_none_to_resume_from(tmp_path):
    assert CheckpointFolder(tmp_path / "checkpoints", 2).latest() is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_by_step_and_not_by_name(tmp_path, keep):
    save(tmp_path, 8, 9, 999_999, 1_000_000, keep=keep)
    kept = ["step-000008", "step-000009", "step-999999", "step-1000000"][-keep:]
    assert sorted(kept) == names(tmp_path)
    assert CheckpointFolder(tmp_path, keep).latest()[0].step == 1_000_000


@pytest.mark.parametrize("error", [OSError("disk full"), asyncio.CancelledError(), SystemExit()])
def test_a_save_that_breaks_off_leaves_the_one_before_in_force(tmp_path, error):
    save(tmp_path, 2, keep=1)

    async def breaks_off(folder):
        await write_shards(folder)
        raise error

    with pytest.raises(type(error)):
        save(tmp_path, 3, keep=1, save_learner=breaks_off)
    assert CheckpointFolder(tmp_path, 1).latest()[0].step == 2


def test_what_a_broken_save_left_goes_with_the_next_one(tmp_path):
    (tmp_path / "unfinished-000002" / "learner").mkdir(parents=True)
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-000004"]


def test_a_checkpoint_has_its_name_only_once_it_is_whole(tmp_path):
    async def looks_around(folder):
        assert names(tmp_path) == ["step-000001", "unfinished-000002"]
        await write_shards(folder)

    save(tmp_path, 1)
    save(tmp_path, 2, save_learner=looks_around)
    assert names(tmp_path) == ["step-000001", "step-000002"]


class SlowDisk:
    """A learner that begins to write at once, and is done when told to be."""

    def __init__(self):
        self.is_full = False
        self.may_end = asyncio.Event()

    async def save(self, folder):
        await write_shards(folder)

        async def finish():
            await self.may_end.wait()
            if self.is_full:
                raise CheckpointError("disk full")

        return finish


def test_a_save_returns_while_a_part_is_written_and_has_its_name_only_after_that(tmp_path):
    async def scenario():
        disk, folder, settled = SlowDisk(), CheckpointFolder(tmp_path, 1), []
        await folder.save(STATE, {"learner": disk.save}, settled.append)
        await asyncio.sleep(0)
        assert names(tmp_path) == ["unfinished-000003"]
        assert settled == []
        disk.may_end.set()
        await folder.finish()
        assert names(tmp_path) == ["step-000003"]
        assert settled == [3]

    asyncio.run(scenario())


def test_one_checkpoint_is_written_at_a_time_and_its_error_is_raised_once(tmp_path):
    async def scenario():
        disk, folder, begun = SlowDisk(), CheckpointFolder(tmp_path, 1), []

        async def next_part(path):
            begun.append(path)

        await folder.save(STATE, {"learner": disk.save})
        second = asyncio.ensure_future(folder.save(replace(STATE, step=4), {"learner": next_part}))
        await asyncio.sleep(0.01)
        assert not second.done()
        assert begun == []
        disk.is_full = True
        disk.may_end.set()
        with pytest.raises(CheckpointError, match="disk full"):
            await second
        await folder.finish()
        assert folder.latest() is None

    asyncio.run(scenario())


def test_a_step_is_saved_once_and_its_checkpoint_never_taken_away(tmp_path):
    async def must_not_be_called(folder):
        raise AssertionError(folder)

    save(tmp_path, 5, keep=1)
    save(tmp_path, 5, keep=1, save_learner=must_not_be_called)
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"schema": 0}', '{"step": 3}'], ids=["torn", "list", "older", "none"]
)
def test_a_checkpoint_of_another_version_is_refused_with_what_to_do(tmp_path, content):
    save(tmp_path, 3)
    (tmp_path / "step-000003" / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"schema 1.*remove this checkpoint"):
        CheckpointFolder(tmp_path, 2).latest()


@pytest.mark.parametrize("change", [{"pending": None}, {"surprise": 1}])
def test_a_checkpoint_that_lacks_something_is_refused(tmp_path, change):
    save(tmp_path, 3)
    path = tmp_path / "step-000003" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match="incomplete"):
        CheckpointFolder(tmp_path, 2).latest()


def test_other_things_in_the_folder_are_no_checkpoints(tmp_path):
    (tmp_path / "step-by-step").mkdir()
    (tmp_path / "step-000001.bak").mkdir()
    assert CheckpointFolder(tmp_path, 1).latest() is None
    save(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step-000001.bak", "step-000007", "step-by-step"]
