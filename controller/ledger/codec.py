"""A finished group as bytes, by `packed_arrays`."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from paceline.configs.packed_arrays import (
    UnreadableError,
    is_whole,
    pack_arrays,
    unpack_arrays,
)
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

_KIND = "group"
_ARRAYS: dict[str, np.dtype[Any]] = {
    "token_ids": np.dtype("<i4"),
    "logprobs": np.dtype("<f4"),
    "teacher_logprobs": np.dtype("<f4"),
    "routed_experts": np.dtype("<i2"),
    "draft_sources": np.dtype(np.uint8),
}
"""Types of a sample's arrays; the widest come first."""
_OF_PROMPT_TOO = "routed_experts"
"""Has entries for the prompt's tokens before those of the completion's."""
_UNKNOWN = {"draft_sources": 0, "routed_experts": NOT_ROUTED}
"""Values that stand for them in a sample that was finished before the engines recorded them."""
_WHAT_TO_DO = "restore the ledger from a copy, or start the run anew under another name"


def encode_group(group: Group) -> bytes:
    """Return the samples of a group in one piece; its prompt is named, not kept."""
    facts = {
        "group_id": group.group_id,
        "prompt": group.prompt.id,
        "prompt_tokens": _checksum(group.prompt),
        "fault": group.fault,
        "lengths": [sample.num_tokens for sample in group.samples],
        "samples": [_facts(sample) for sample in group.samples],
    }
    shapes = {name: _shape_of_token(group, name) for name in _present(group)}
    num_prompt = len(group.prompt.token_ids)
    arrays = {
        name: [
            np.asarray(_array(sample, name, shape, num_prompt), _ARRAYS[name])
            for sample in group.samples
        ]
        for name, shape in shapes.items()
    }
    return pack_arrays(_KIND, facts, arrays)


def decode_group(content: bytes, prompt: Prompt, group_id: int) -> Group:
    """Decode what `encode_group` wrote, with its prompt.

    Raises:
        LedgerError: the bytes are missing or damaged, or of another group or prompt.
    """
    verify(content, group_id)
    try:
        facts, arrays = unpack_arrays(_KIND, content)
    except UnreadableError as error:
        raise LedgerError(f"the stored samples of group {group_id} are unreadable: {error}") from (
            error
        )
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
    if not is_whole(content):
        raise LedgerError(
            f"the stored samples of group {group_id} are damaged, their checksum does not match: "
            f"{_WHAT_TO_DO}"
        )


def _checksum(prompt: Prompt) -> int:
    return xxhash.xxh3_64_intdigest(np.array(prompt.token_ids, "<i4").tobytes())


def _present(group: Group) -> list[str]:
    """List the arrays that the group's samples have."""
    is_taught = {sample.teacher_logprobs is not None for sample in group.samples}
    assert len(is_taught) == 1, "a teacher looked at all samples of a group or at none"
    return [n for n in _ARRAYS if any(_stored(s, n) is not None for s in group.samples)]


def _stored(sample: Sample, name: str) -> NDArray[Any] | None:
    return getattr(sample if name == "teacher_logprobs" else sample.completion, name)


def _shape_of_token(group: Group, name: str) -> tuple[int, ...]:
    """Return the shape of an array's entry for one token: one number, or several."""
    return next(a.shape[1:] for s in group.samples if (a := _stored(s, name)) is not None)


def _lengths(name: str, completions: NDArray[np.int64], num_prompt: int) -> NDArray[np.int64]:
    """Return how many tokens an array has entries for, of each sample."""
    return completions + num_prompt if name == _OF_PROMPT_TOO else completions


def _array(sample: Sample, name: str, shape: tuple[int, ...], num_prompt: int) -> NDArray[Any]:
    """Return an array of a sample, filled with the value for unknown if it was not recorded."""
    array = _stored(sample, name)
    if array is None:
        (length,) = _lengths(name, np.array([sample.num_tokens]), num_prompt)
        return np.full((length, *shape), _UNKNOWN[name], _ARRAYS[name])
    return array


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
