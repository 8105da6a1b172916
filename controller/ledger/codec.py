"""A finished group as bytes: safetensors arrays, the rest as JSON in their header, a checksum."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from paceline.configs.vocabulary import (
    NOT_ROUTED,
    Group,
    Prompt,
    Trajectory,
    VersionSpan,
    WeightVersion,
)
from paceline.controller.ledger.events import LedgerError

_CHECKSUM = struct.Struct("<Q")
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_ARRAYS: dict[str, tuple[np.dtype[Any], str]] = {
    "token_ids": (np.dtype("<i4"), "I32"),
    "logprobs": (np.dtype("<f4"), "F32"),
    "teacher_logprobs": (np.dtype("<f4"), "F32"),
    "routed_experts": (np.dtype("<i2"), "I16"),
    "loss_mask": (np.dtype(np.bool_), "BOOL"),
    "draft_sources": (np.dtype(np.uint8), "U8"),
}
"""Types of what a trajectory holds, in numpy and in safetensors; the widest come first."""
_UNKNOWN = {"draft_sources": 0, "routed_experts": NOT_ROUTED}
"""What stands for them in a sample that was finished before the engines recorded them."""
_WHAT_TO_DO = "restore the ledger from a copy, or start the run anew under another name"


def encode_group(group: Group) -> bytes:
    """Samples of a group in one piece; its prompt is named, not kept: the feed has it."""
    shapes = {name: _shape_of_token(group, name) for name in _present(group)}
    arrays: list[memoryview] = [
        np.ascontiguousarray(_array(trajectory, name, shape), _ARRAYS[name][0]).data
        for name, shape in shapes.items()
        for trajectory in group.trajectories
    ]
    header = _header(group, shapes)
    # Our own safetensors writer: the library's would copy every byte four times.
    body = b"".join((_LENGTH.pack(len(header)), header, *arrays))
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body)) + body


def decode_group(content: bytes, prompt: Prompt, group_id: int) -> Group:
    """What `encode_group` wrote, with its prompt.

    Raises:
        LedgerError: the bytes are missing or damaged, or of another group or prompt.
    """
    verify(content, group_id)
    arrays, facts = _read(content[_CHECKSUM.size :], group_id)
    if (facts["group_id"], facts["prompt"]) != (group_id, prompt.id):
        raise LedgerError(
            f"the ledger holds group {facts['group_id']} of prompt {facts['prompt']} where group "
            f"{group_id} of prompt {prompt.id} was expected: the data changed, or the ledger is "
            "of another run; resume with the same data"
        )
    ends = np.cumsum(facts["lengths"])[:-1]
    parts = {name: np.split(array, ends) for name, array in arrays.items()}
    trajectories = tuple(
        _trajectory(sample, {name: parts[name][index] for name in parts})
        for index, sample in enumerate(facts["samples"])
    )
    return Group(group_id, prompt, trajectories, facts["fault"])


def verify(content: bytes, group_id: int) -> None:
    """Check bytes that `encode_group` wrote against their checksum.

    Raises:
        LedgerError: they are damaged, or none.
    """
    if not content:
        raise LedgerError(f"the samples of group {group_id} are missing: {_WHAT_TO_DO}")
    body = memoryview(content)[_CHECKSUM.size :]
    if len(content) < _CHECKSUM.size or _CHECKSUM.unpack_from(content)[0] != (
        xxhash.xxh3_64_intdigest(body)
    ):
        raise LedgerError(
            f"the stored samples of group {group_id} are damaged, their checksum does not match: "
            f"{_WHAT_TO_DO}"
        )


def _present(group: Group) -> list[str]:
    """The arrays that the group's trajectories have."""
    is_taught = {trajectory.teacher_logprobs is not None for trajectory in group.trajectories}
    assert len(is_taught) == 1, "a teacher looked at all samples of a group or at none"
    return [n for n in _ARRAYS if any(getattr(t, n) is not None for t in group.trajectories)]


def _shape_of_token(group: Group, name: str) -> tuple[int, ...]:
    """What an array holds of each token: one number, or several."""
    return next(a.shape[1:] for t in group.trajectories if (a := getattr(t, name)) is not None)


def _array(trajectory: Trajectory, name: str, shape: tuple[int, ...]) -> Any:
    """An array of a trajectory; what was not recorded of its sample is not known."""
    array = getattr(trajectory, name)
    if array is None:
        return np.full((len(trajectory.token_ids), *shape), _UNKNOWN[name], _ARRAYS[name][0])
    return array


def _header(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """What safetensors says before the arrays, padded so that they are aligned."""
    lengths = [len(trajectory.token_ids) for trajectory in group.trajectories]
    facts = {
        "group_id": group.group_id,
        "prompt": group.prompt.id,
        "fault": group.fault,
        "lengths": lengths,
        "samples": [_facts(trajectory) for trajectory in group.trajectories],
    }
    text = f'{{"__metadata__":{{"group":{json.dumps(json.dumps(facts))}}}'
    length, start = sum(lengths), 0
    for name, of_token in shapes.items():
        dtype, code = _ARRAYS[name]
        shape = [length, *of_token]
        end = start + math.prod(shape) * dtype.itemsize
        text += f',"{name}":{{"dtype":"{code}","shape":{shape},"data_offsets":[{start},{end}]}}'
        start = end
    text += "}"
    return text.encode().ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)


def _read(body: bytes, group_id: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    header_length = _LENGTH.unpack_from(body)[0]
    header = json.loads(body[_LENGTH.size : _LENGTH.size + header_length])
    try:
        return safetensors.load(body), json.loads(header["__metadata__"]["group"])
    except (SafetensorError, KeyError) as error:  # whole, but not written by `encode_group`
        raise LedgerError(f"the stored samples of group {group_id} are unreadable: {error}") from (
            error
        )


def _facts(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "versions": [(span.version, span.start, span.end) for span in trajectory.versions],
        "finish_reason": trajectory.finish_reason,
        "reward": trajectory.reward,
        "text": trajectory.text,
    }


def _trajectory(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trajectory:
    spans = (VersionSpan(WeightVersion(v), start, end) for v, start, end in facts["versions"])
    return Trajectory(
        **arrays,
        versions=tuple(spans),
        finish_reason=facts["finish_reason"],
        reward=facts["reward"],
        text=facts["text"],
    )
