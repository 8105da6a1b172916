"""A finished group as bytes: safetensors arrays, the rest as JSON in their header, a checksum."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from paceline.configs.vocabulary import (
    NOT_ROUTED,
    Completion,
    Group,
    Prompt,
    Sample,
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
    "draft_sources": (np.dtype(np.uint8), "U8"),
}
"""Types of a sample's arrays, in numpy and in safetensors; the widest come first."""
_OF_PROMPT_TOO = "routed_experts"
"""Has entries for the prompt's tokens before those of the completion's."""
_UNKNOWN = {"draft_sources": 0, "routed_experts": NOT_ROUTED}
"""What stands for them in a sample that was finished before the engines recorded them."""
_WHAT_TO_DO = "restore the ledger from a copy, or start the run anew under another name"


def encode_group(group: Group) -> bytes:
    """Samples of a group in one piece; its prompt is named, not kept: the feed has it."""
    shapes = {name: _shape_of_token(group, name) for name in _present(group)}
    num_prompt = len(group.prompt.token_ids)
    arrays: list[memoryview] = [
        np.ascontiguousarray(_array(sample, name, shape, num_prompt), _ARRAYS[name][0]).data
        for name, shape in shapes.items()
        for sample in group.samples
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
    if facts["prompt_tokens"] != _checksum(prompt):
        raise LedgerError(
            f"group {group_id} was sampled from other tokens of prompt {prompt.id}: its text, the "
            "prompt's template or the tokenizer changed; resume with the same"
        )
    lengths, num_prompt = np.array(facts["lengths"]), len(prompt.token_ids)
    parts = {
        name: np.split(array, np.cumsum(_lengths(name, lengths, num_prompt))[:-1])
        for name, array in arrays.items()
    }
    samples = tuple(
        _sample(of_sample, {name: parts[name][index] for name in parts})
        for index, of_sample in enumerate(facts["samples"])
    )
    return Group(group_id, prompt, samples, facts["fault"])


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


def _checksum(prompt: Prompt) -> int:
    return xxhash.xxh3_64_intdigest(np.array(prompt.token_ids, "<i4").tobytes())


def _present(group: Group) -> list[str]:
    """The arrays that the group's samples have."""
    is_taught = {sample.teacher_logprobs is not None for sample in group.samples}
    assert len(is_taught) == 1, "a teacher looked at all samples of a group or at none"
    return [n for n in _ARRAYS if any(_stored(s, n) is not None for s in group.samples)]


def _stored(sample: Sample, name: str) -> NDArray[Any] | None:
    return getattr(sample if name == "teacher_logprobs" else sample.completion, name)


def _shape_of_token(group: Group, name: str) -> tuple[int, ...]:
    """What an array holds of each token: one number, or several."""
    return next(a.shape[1:] for s in group.samples if (a := _stored(s, name)) is not None)


def _lengths(name: str, completions: NDArray[np.int64], num_prompt: int) -> NDArray[np.int64]:
    """Return how many tokens an array has entries for, of each sample."""
    return completions + num_prompt if name == _OF_PROMPT_TOO else completions


def _array(sample: Sample, name: str, shape: tuple[int, ...], num_prompt: int) -> NDArray[Any]:
    """An array of a sample; what was not recorded of it is not known."""
    array = _stored(sample, name)
    if array is None:
        (length,) = _lengths(name, np.array([sample.num_tokens]), num_prompt)
        return np.full((length, *shape), _UNKNOWN[name], _ARRAYS[name][0])
    return array


def _header(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """What safetensors says before the arrays, padded so that they are aligned."""
    lengths = [sample.num_tokens for sample in group.samples]
    facts = {
        "group_id": group.group_id,
        "prompt": group.prompt.id,
        "prompt_tokens": _checksum(group.prompt),
        "fault": group.fault,
        "lengths": lengths,
        "samples": [_facts(sample) for sample in group.samples],
    }
    text = f'{{"__metadata__":{{"group":{json.dumps(json.dumps(facts))}}}'
    start = 0
    for name, of_token in shapes.items():
        dtype, code = _ARRAYS[name]
        of_samples = _lengths(name, np.array(lengths), len(group.prompt.token_ids))
        shape = [int(of_samples.sum()), *of_token]
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


def _facts(sample: Sample) -> dict[str, Any]:
    completion = sample.completion
    return {
        "versions": [(span.version, span.start, span.end) for span in completion.versions],
        "finish_reason": completion.finish_reason,
        "reward": sample.reward,
        "text": sample.text,
    }


def _sample(facts: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Sample:
    spans = (VersionSpan(WeightVersion(v), start, end) for v, start, end in facts["versions"])
    teacher_logprobs = arrays.pop("teacher_logprobs", None)
    completion = Completion(**arrays, versions=tuple(spans), finish_reason=facts["finish_reason"])
    return Sample(completion, facts["reward"], facts["text"], teacher_logprobs)
