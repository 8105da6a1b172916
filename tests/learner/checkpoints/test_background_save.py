"""Saving beside training: the step that was saved, whole or refused; no step waits for a disk."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager

from paceline.configs.errors import CheckpointError
from tests.learner import ranks
from tests.learner.conftest import random_batch
from tests.learner.ranks import LOSS, OPTIMIZER, make_worker, train, weights
from tests.learner.test_worker import assert_same

PATIENCE_SECONDS = 60.0


@pytest.fixture
def new_worker(model_folder, tmp_path):
    return partial(make_worker, model_folder, tmp_path / "weights")


@pytest.fixture
def gate(monkeypatch):
    """``gate(class, method)``: that method, in any thread, waits until the event is set."""

    def close(owner, method):
        opened = threading.Event()
        passed = getattr(owner, method)

        def waits(*arguments, **keywords):
            assert opened.wait(PATIENCE_SECONDS)
            return passed(*arguments, **keywords)

        monkeypatch.setattr(owner, method, waits)
        return opened

    return close


def loaded(worker, folder):
    worker.load(str(folder))
    return worker.version, ranks.whole_state(worker)


def test_training_goes_on_while_the_disk_is_slow_and_the_saved_step_is_what_was_saved(
    new_worker, tmp_path, gate
):
    worker, folder = new_worker(), tmp_path / "checkpoint"
    train(worker, [random_batch(0)])
    expected = ranks.whole_state(worker)
    disk = gate(FileSystemWriter, "write_data")
    worker.save(str(folder))
    train(worker, [random_batch(1), random_batch(2)], start=1)
    assert not (folder / ".metadata").exists()
    disk.set()
    worker.finish_save()
    version, found = loaded(new_worker(), folder)
    assert version == 1
    assert_same(found, expected)


@pytest.mark.parametrize("is_awaited", [False, True])
def test_an_optimiser_waits_for_the_copy_and_a_gradient_does_not(
    new_worker, tmp_path, gate, is_awaited
):
    """Also while another thread waits for the whole checkpoint."""
    worker, folder = new_worker(), tmp_path / "checkpoint"
    expected = ranks.whole_state(worker)
    copying = gate(DefaultStager, "_stage")
    worker.save(str(folder))
    if is_awaited:
        threading.Thread(target=worker.finish_save).start()
    worker.forward_backward(random_batch(), LOSS)
    step = threading.Thread(target=worker.optimizer_step, args=(OPTIMIZER, 0, 100))
    step.start()
    step.join(0.3)
    assert step.is_alive()
    assert_same(ranks.whole_state(worker), expected)
    copying.set()
    step.join(PATIENCE_SECONDS)
    worker.finish_save()
    assert worker.version == 1
    assert_same(loaded(new_worker(), folder)[1], expected)


@pytest.mark.parametrize("is_awaited", [False, True])
@pytest.mark.parametrize("call", ["save", "load", "export", "close"])
def test_calls_that_need_the_disk_wait_for_the_save_in_flight(
    new_worker, tmp_path, gate, call, is_awaited
):
    worker, folder = new_worker(), tmp_path / "checkpoint"
    disk = gate(FileSystemWriter, "write_data")
    worker.save(str(folder))
    if is_awaited:
        threading.Thread(target=worker.finish_save).start()
    arguments = {"save": (str(tmp_path / "next"),), "load": (str(folder),)}
    arguments |= {"export": (str(tmp_path / "model"),), "close": ()}
    waiting = threading.Thread(target=getattr(worker, call), args=arguments[call])
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    disk.set()
    waiting.join(PATIENCE_SECONDS)
    assert (folder / ".metadata").exists()


@pytest.mark.parametrize("call", ["save", "load", "export", "finish_save", "close"])
def test_a_save_that_fails_surfaces_at_the_next_call_with_its_cause(
    new_worker, tmp_path, monkeypatch, call
):
    def full(*_):
        raise OSError("No space left on device")

    worker = new_worker()
    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    worker.save(str(tmp_path / "checkpoint"))
    train(worker, [random_batch()])
    arguments = () if call in ("finish_save", "close") else (str(tmp_path / "next"),)
    with pytest.raises(CheckpointError, match="checkpoint could not be written.*No space left"):
        getattr(worker, call)(*arguments)
    monkeypatch.undo()
    if call != "close":
        ranks.save_whole(worker, str(tmp_path / "another"))
        assert loaded(new_worker(), tmp_path / "another")[0] == 1


def test_buffers_of_one_save_serve_the_next(new_worker, tmp_path):
    worker = new_worker()
    ranks.save_whole(worker, str(tmp_path / "0"))
    buffers = worker._saving._stager._state_dict_stager._cached_storage_mapping
    addresses = sorted(buffer.data_ptr() for buffer in buffers.values())
    train(worker, [random_batch()])
    ranks.save_whole(worker, str(tmp_path / "1"))
    assert sorted(buffer.data_ptr() for buffer in buffers.values()) == addresses
    assert_same(loaded(new_worker(), tmp_path / "1")[1], ranks.whole_state(worker))


def damage(folder, how):
    """Spoil a checkpoint of one rank as a copy that broke off does."""
    file = next(Path(folder).glob("*.distcp"))
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        metadata = Path(folder) / ".metadata"
        metadata.write_bytes(metadata.read_bytes()[: metadata.stat().st_size // 2])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", r"__0_0.distcp has 0 bytes, expected \d+"),
        ("truncated", r"__0_0.distcp has \d+ bytes, expected \d+"),
        ("torn", ".metadata is damaged"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_before_anything_is_overwritten(
    new_worker, tmp_path, how, said
):
    writer, folder = new_worker(), tmp_path / "checkpoint"
    train(writer, [random_batch()])
    ranks.save_whole(writer, str(folder))
    damage(folder, how)
    worker = new_worker()
    before = ranks.whole_state(worker)
    with pytest.raises(CheckpointError, match=said):
        worker.load(str(folder))
    assert worker.version == 0
    assert_same(ranks.whole_state(worker), before)


def test_a_checkpoint_without_moments_is_refused_before_anything_is_overwritten(
    new_worker, tmp_path
):
    writer, folder = new_worker(), str(tmp_path / "checkpoint")
    train(writer, [random_batch()])
    state = {"policy": {"model": writer._models.policy.state()["model"]}}
    writer._saving.begin(folder, state)
    writer.finish_save()
    worker = new_worker()
    before = weights(worker)
    with pytest.raises(CheckpointError, match=r"shape None for optimizer\..*step"):
        worker.load(folder)
    assert_same(weights(worker), before)


MESHES = [(1, {}), (4, {}), (2, {}), (4, {"parallel": {"replicate": 2}})]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(MESHES)))
def test_weights_and_moments_are_the_same_after_loading_on_a_mesh_what_another_saved(
    on_ranks, tmp_path, index
):
    """Each mesh loads what the one before it saved. Every layout: `engines/test_conformance.py`."""
    batches, folder = [random_batch(seed=seed) for seed in range(2)], str(tmp_path / "checkpoint")
    (num_saving, saving), (num_loading, loading) = MESHES[index - 1], MESHES[index]
    program = (ranks.train_save_and_look, batches, folder)
    saved, *others = on_ranks(num_saving, *program, **saving)
    assert any(name.endswith("exp_avg_sq") and values.any() for name, values in saved.items())
    for other in others:
        assert_same(other, saved)
    for version, found in on_ranks(num_loading, ranks.load_and_look, folder, **loading):
        assert version == len(batches)
        assert_same(found, saved)


@pytest.mark.slow
def test_a_rank_that_cannot_write_fails_the_save_of_all_and_leaves_nothing_complete(
    on_ranks, tmp_path
):
    folder = str(tmp_path / "checkpoint")
    errors = on_ranks(2, ranks.save_where_rank_1_fails, folder, random_batch())
    assert all("disk of rank 1" in error for error in errors)
    assert not (tmp_path / "checkpoint" / ".metadata").exists()
