"""Named arrays and facts as bytes: a checksum, then what safetensors reads.

The first eight bytes are the XXH3-64 of the others (little-endian). In the header of safetensors
the facts are JSON under the name of what was packed, its *kind*.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

_CHECKSUM = struct.Struct("<Q")
_HEADER_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_CODES = {"<i8": "I64", "<i4": "I32", "<f4": "F32", "<i2": "I16", "|u1": "U8"}
"""Names of numpy's types in safetensors."""


class UnreadableError(ValueError):
    """Bytes that are whole, but are not what was expected; the message says what they are."""


def pack_arrays(
    kind: str, facts: Mapping[str, Any], arrays: Mapping[str, Sequence[NDArray[Any]]]
) -> bytes:
    """Return facts and arrays as bytes; pieces of an array follow each other on its first axis.

    The pieces of an array, one at least, have one dtype of int64, int32, float32, int16 and uint8.
    Arrays of wide types come before those of narrower ones, so that all are aligned.
    """
    pieces = [np.ascontiguousarray(piece).data for of_one in arrays.values() for piece in of_one]
    header = _header(kind, facts, arrays)
    # The library's own writer would copy every byte four times.
    body = b"".join((_HEADER_LENGTH.pack(len(header)), header, *pieces))
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body)) + body


def is_whole(content: bytes) -> bool:
    """Return whether the bytes are as `pack_arrays` wrote them, by their checksum."""
    if len(content) < _CHECKSUM.size:
        return False
    (expected,) = _CHECKSUM.unpack_from(content)
    return bool(expected == xxhash.xxh3_64_intdigest(memoryview(content)[_CHECKSUM.size :]))


def unpack_arrays(kind: str, content: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return facts and arrays of bytes that are whole.

    Raises:
        UnreadableError: they are of another kind, or `pack_arrays` did not write them.
    """
    body = content[_CHECKSUM.size :]
    try:
        arrays = safetensors.load(body)
        (length,) = _HEADER_LENGTH.unpack_from(body)
        metadata = json.loads(body[_HEADER_LENGTH.size :][:length])["__metadata__"]
    except (SafetensorError, KeyError) as error:
        raise UnreadableError(f"no arrays of Paceline: {error}") from error
    if kind not in metadata:
        raise UnreadableError(f"{', '.join(metadata)!r}, expected {kind!r}")
    return json.loads(metadata[kind]), arrays


def _header(
    kind: str, facts: Mapping[str, Any], arrays: Mapping[str, Sequence[NDArray[Any]]]
) -> bytes:
    """Return what safetensors says before the arrays, padded so that they are aligned."""
    entries: dict[str, Any] = {"__metadata__": {kind: json.dumps(facts)}}
    start = 0
    for name, pieces in arrays.items():
        end = start + sum(piece.nbytes for piece in pieces)
        entries[name] = {
            "dtype": _CODES[pieces[0].dtype.str],
            "shape": [sum(map(len, pieces)), *pieces[0].shape[1:]],
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries).encode()
    return text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
