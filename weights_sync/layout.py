"""Layout of weights: the tensors they hold and where each lies in one flat buffer (pure)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

ALIGNMENT = 64
"""Bytes every tensor starts on a multiple of: one cache line, and enough for any element type."""

ITEM_SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor by its Hugging Face parameter name; ``dtype`` is one of ``ITEM_SIZES``."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's elements in bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """An ordered set of tensors, packed into one buffer at aligned offsets.

    Tied weights appear once, under the name of the tensor that owns the storage.
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.tensors]
        assert len(set(names)) == len(names), "a tensor is named twice in the layout"
        for spec in self.tensors:
            if spec.dtype not in ITEM_SIZES:
                raise ValueError(
                    f"tensor {spec.name} has dtype {spec.dtype}; expected one of {list(ITEM_SIZES)}"
                )

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of each tensor in the buffer."""
        return {spec.name: offset for spec, offset in self._placed()}

    @cached_property
    def num_bytes(self) -> int:
        """Size of the whole buffer in bytes, padding included."""
        return max((offset + spec.num_bytes for spec, offset in self._placed()), default=0)

    def _placed(self) -> Iterator[tuple[TensorSpec, int]]:
        offset = 0
        for spec in self.tensors:
            yield spec, offset
            offset += math.ceil(spec.num_bytes / ALIGNMENT) * ALIGNMENT
