"""Names on disk: what Hugging Face checkpoints, and vLLM with them, call a model's tensors (pure).

Transformers holds the experts of a layer as two tensors, ``gate_up_proj`` [E, 2 I, H] and
``down_proj`` [E, H, I]; a checkpoint has the matrices of each expert by themselves. Every other
tensor has one name in both places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from paceline.weights_sync.shared_memory import Shard

Shape = tuple[int, ...]


def shapes_on_disk(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
    """Yield names and shapes of a checkpoint's tensors, from those in memory."""
    for name, shape in shapes.items():
        matrices = _matrices(name, shape)
        if not matrices:
            yield name, shape
            continue
        for expert in range(shape[0]):
            for matrix, rows in matrices.items():
                yield _expert_name(name, expert, matrix), (len(rows), shape[2])


def shards_on_disk(shard: Shard, shape: Shape) -> Iterator[Shard]:
    """Yield a piece of a tensor of ``shape`` as pieces of the tensors a checkpoint has for it."""
    matrices = _matrices(shard.name, shape)
    if not matrices:
        yield shard
        return
    experts, rows, columns = (
        range(*where.indices(size)) for where, size in zip(shard.index, shape, strict=True)
    )
    for expert, values in zip(experts, shard.values, strict=True):
        for matrix, whole in matrices.items():
            start, stop = max(rows.start, whole.start), min(rows.stop, whole.stop)
            if start < stop:
                yield Shard(
                    _expert_name(shard.name, expert, matrix),
                    (
                        slice(start - whole.start, stop - whole.start),
                        slice(columns.start, columns.stop),
                    ),
                    values[start - rows.start : stop - rows.start],
                )


def _matrices(name: str, shape: Shape) -> dict[str, range]:
    """Return the rows of each matrix in a tensor of experts; empty for any other tensor."""
    if name.endswith(".mlp.experts.gate_up_proj"):
        half = shape[1] // 2
        return {"gate_proj": range(half), "up_proj": range(half, shape[1])}
    if name.endswith(".mlp.experts.down_proj"):
        return {"down_proj": range(shape[1])}
    return {}


def _expert_name(name: str, expert: int, matrix: str) -> str:
    return f"{name.rpartition('.')[0]}.{expert}.{matrix}.weight"
