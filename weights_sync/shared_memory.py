"""Shared-memory transport: learner ranks write their shards into one file, engines map and read it.

Two files take turns, so that version v + 1 is written while engines may still be reading v. The
controller never lets v + 2 be written before every engine acknowledged v + 1, and the checksum
turns a breach of that order into an error instead of silently mixed weights. One machine only: the
file lives in ``/dev/shm``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from paceline.configs.vocabulary import WeightVersion
from paceline.weights_sync.handle import WeightHandle, WeightSyncError
from paceline.weights_sync.layout import Layout

NUM_SLOTS = 2


@dataclass(frozen=True)
class Shard:
    """A rank's piece of a tensor: ``index`` are its slices in the whole tensor's coordinates."""

    name: str
    index: tuple[slice, ...]
    values: torch.Tensor


class SharedMemoryPublisher:
    """The writing side; one on every learner rank, all on the same folder and layout."""

    def __init__(self, folder: str, layout: Layout) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._layout = layout
        self._buffers: dict[int, torch.Tensor] = {}

    def write(self, version: int, shards: Iterable[Shard]) -> None:
        """Copy this rank's shards into the slot of ``version``, casting to the layout's dtypes."""
        tensors = tensor_views(self._buffer(version), self._layout)
        for shard in shards:
            tensors[shard.name][shard.index].copy_(shard.values.detach())

    def commit(self, version: int) -> WeightHandle:
        """Announce ``version``: call on one rank, after every rank's ``write`` returned."""
        checksum = buffer_checksum(self._buffer(version))
        path = str(self._path(version))
        return WeightHandle(WeightVersion(version), path, checksum, self._layout)

    def _path(self, version: int) -> Path:
        return self._folder / f"weights-{version % NUM_SLOTS}.bin"

    def _buffer(self, version: int) -> torch.Tensor:
        slot = version % NUM_SLOTS
        if slot not in self._buffers:
            self._buffers[slot] = map_file(self._path(version), self._layout.num_bytes, create=True)
        return self._buffers[slot]


def read_weights(handle: WeightHandle) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` views of the published weights, checked against their checksum.

    The views alias the publisher's memory: copy before the handle is acknowledged.

    Raises:
        WeightSyncError: the file is missing, too short, or holds other bytes than announced.
    """
    verify(handle)
    buffer = map_file(Path(handle.path), handle.layout.num_bytes, create=False)
    yield from tensor_views(buffer, handle.layout).items()


def verify(handle: WeightHandle) -> int:
    """Return the checksum of the bytes that lie where a handle says: the announced one.

    Raises:
        WeightSyncError: the file is missing, too short, or holds other bytes than announced.
    """
    path = Path(handle.path)
    if not path.exists() or path.stat().st_size < handle.layout.num_bytes:
        raise WeightSyncError(
            f"weights of version {handle.version} are not at {path}: the shared-memory transport "
            "needs learner and engines on one machine"
        )
    found = buffer_checksum(map_file(path, handle.layout.num_bytes, create=False))
    if found != handle.checksum:
        raise WeightSyncError(
            f"weights of version {handle.version} have checksum {found:016x}, "
            f"announced {handle.checksum:016x}: overwritten or torn, refusing to serve them"
        )
    return found


def map_file(path: Path, num_bytes: int, *, create: bool) -> torch.Tensor:
    """Map ``num_bytes`` of a file as a shared uint8 tensor [num_bytes].

    Pages of a new file are reserved at once: on a full ``/dev/shm`` this raises, where a write into
    a sparse mapping would kill the process with SIGBUS.

    Raises:
        WeightSyncError: there is no room for the file.
    """
    if create:
        try:
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
        except OSError as error:
            raise WeightSyncError(
                f"{path.parent} has no room for {num_bytes / 2**20:.0f} MiB of weights "
                f"({error.strerror}): enlarge it (a container's --shm-size) or remove what fills it"
            ) from error
    return torch.from_file(str(path), shared=True, size=max(1, num_bytes), dtype=torch.uint8)


def tensor_views(buffer: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """Return views of a flat uint8 buffer as the layout's tensors."""
    views = {}
    for spec in layout.tensors:
        start = layout.offsets[spec.name]
        piece = buffer[start : start + spec.num_bytes]
        views[spec.name] = piece.view(getattr(torch, spec.dtype)).view(spec.shape)
    return views


def buffer_checksum(buffer: torch.Tensor) -> int:
    """Return the xxh3-64 of a flat uint8 tensor."""
    return xxhash.xxh3_64_intdigest(buffer.numpy().data)
