"""Published weights arrive whole, cast and checked, whatever shards they were written in."""

import dataclasses
import errno

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.weights_sync.handle import WeightSyncError
from paceline.weights_sync.layout import ALIGNMENT, Layout, TensorSpec
from paceline.weights_sync.shared_memory import Shard, SharedMemoryPublisher, read_weights

SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=3), min_size=1, max_size=5)


def layout_of(shapes, dtypes=("float32", "bfloat16")) -> Layout:
    return Layout(
        tuple(
            TensorSpec(f"t{i}", tuple(shape), dtypes[i % len(dtypes)])
            for i, shape in enumerate(shapes)
        )
    )


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 3), st.integers(0, 9))
def test_shards_of_any_number_of_ranks_make_the_whole(tmp_path_factory, shapes, ranks, version):
    layout = layout_of(shapes)
    folder = str(tmp_path_factory.mktemp("shm"))
    torch.manual_seed(version)
    whole = {spec.name: torch.randn(spec.shape) for spec in layout.tensors}
    publishers = [SharedMemoryPublisher(folder, layout) for _ in range(ranks)]
    for rank, publisher in enumerate(publishers):
        publisher.write(version, shards_of(whole, rank, ranks))
    read = dict(read_weights(publishers[0].commit(version)))
    for spec in layout.tensors:
        expected = whole[spec.name].to(getattr(torch, spec.dtype))
        assert torch.equal(read[spec.name], expected)


def shards_of(whole, rank, ranks):
    """Rows of each tensor in turn, as FSDP deals them; scalars belong to rank 0."""
    for name, tensor in whole.items():
        if tensor.ndim == 0:
            if rank == 0:
                yield Shard(name, (), tensor)
            continue
        size = -(-tensor.shape[0] // ranks)
        rows = slice(min(rank * size, tensor.shape[0]), min((rank + 1) * size, tensor.shape[0]))
        yield Shard(name, (rows,), tensor[rows])


@given(SHAPES)
def test_tensors_are_aligned_and_do_not_overlap(shapes):
    layout = layout_of(shapes)
    end = 0
    for spec in layout.tensors:
        assert layout.offsets[spec.name] % ALIGNMENT == 0
        assert layout.offsets[spec.name] >= end
        end = layout.offsets[spec.name] + spec.num_bytes
    assert layout.num_bytes == end


def published(tmp_path, version, value=1.0):
    layout = layout_of([(4, 4)], ("float32",))
    publisher = SharedMemoryPublisher(str(tmp_path), layout)
    publisher.write(version, [Shard("t0", (slice(0, 4),), torch.full((4, 4), value))])
    return publisher, publisher.commit(version)


def test_the_version_before_stays_readable_while_the_next_is_written(tmp_path):
    publisher, first = published(tmp_path, 1, value=1.0)
    publisher.write(2, [Shard("t0", (slice(0, 4),), torch.full((4, 4), 2.0))])
    publisher.commit(2)
    assert dict(read_weights(first))["t0"].unique().tolist() == [1.0]


def test_a_version_that_was_overwritten_is_refused(tmp_path):
    publisher, first = published(tmp_path, 1, value=1.0)
    publisher.write(3, [Shard("t0", (slice(0, 2),), torch.full((2, 4), 3.0))])
    with pytest.raises(WeightSyncError, match="overwritten or torn"):
        dict(read_weights(first))


def test_weights_of_another_machine_are_missing_in_words(tmp_path):
    _, handle = published(tmp_path, 1)
    with pytest.raises(WeightSyncError, match="on one machine"):
        dict(read_weights(dataclasses.replace(handle, path=str(tmp_path / "nowhere"))))


def test_an_unknown_number_format_is_refused():
    with pytest.raises(ValueError, match="float16"):
        Layout((TensorSpec("t", (1,), "float16"),))


def test_a_full_memory_is_an_error_in_words_and_not_a_dead_process(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(WeightSyncError, match="no room for .* MiB of weights"):
        published(tmp_path, 1)
