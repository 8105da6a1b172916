"""A model's parameters in global coordinates: what is published to engines."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from paceline.weights_sync.layout import Layout, TensorSpec
from paceline.weights_sync.shared_memory import Shard


def layout_of(model: nn.Module, dtype: str) -> Layout:
    """Return where a model's parameters lie when published as ``dtype``; tied weights once."""
    return Layout(
        tuple(TensorSpec(name, tuple(p.shape), dtype) for name, p in model.named_parameters())
    )


def local_shards(model: nn.Module) -> Iterator[Shard]:
    """Yield this rank's piece of every parameter in global coordinates; tied weights once.

    Pieces of all ranks tile each tensor exactly once: of ranks that hold the same piece the first
    yields it, and a rank without a piece of a small tensor yields none for it.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            yield Shard(name, (slice(None),) * parameter.ndim, parameter)
            continue
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if 0 not in shape and _is_first_holder(parameter):
            index = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            yield Shard(name, index, parameter.to_local())


def boxes(shape: tuple[int, ...], start: int, size: int) -> Iterator[tuple[tuple[slice, ...], int]]:
    """Cut a run of ``size`` elements of a flattened tensor into boxes of the tensor, in order.

    Yield each box's slices and number of elements; at most two a dimension, less one.
    """
    row = math.prod(shape[1:])
    while size:
        first, within = divmod(start, row)
        if within == 0 and size >= row:
            taken = size - size % row
            rows = slice(first, first + taken // row)
            yield (rows, *(slice(0, length) for length in shape[1:])), taken
        else:
            taken = min(size, row - within)
            for box, count in boxes(shape[1:], within, taken):
                yield (slice(first, first + 1), *box), count
        start, size = start + taken, size - taken


def _is_first_holder(parameter: DTensor) -> bool:
    """Return whether no earlier rank holds the same piece."""
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "a rank without a place in the mesh has no parameters"
    return all(
        place == 0
        for place, placement in zip(coordinate, parameter.placements, strict=True)
        if placement.is_replicate()
    )
