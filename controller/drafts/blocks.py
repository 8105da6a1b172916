"""Blocks of draft text: published once by the controller in Ray's object store, read by workers.

Every worker gets a reference; it reads the block itself, off its engine's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from paceline.configs.vocabulary import DraftText
from paceline.spec.draft_file import pack, unpack


@dataclass(frozen=True)
class Block:
    """Texts by the subscriber whose engine sampled them, and so has them already.

    With ``drop_before``, texts of older versions are to be dropped by all subscribers.
    """

    texts: Mapping[int, Sequence[DraftText]]
    drop_before: int | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all texts."""
        return sum(len(text.token_ids) for texts in self.texts.values() for text in texts)

    def packed(self) -> PackedBlock:
        """Return the block as bytes, by origin."""
        parts = {origin: pack(texts) for origin, texts in self.texts.items()}
        return PackedBlock(parts, self.drop_before)


@dataclass(frozen=True)
class PackedBlock:
    """A block's texts as bytes, by origin."""

    parts: Mapping[int, bytes]
    drop_before: int | None

    def read(self, subscriber: int) -> list[DraftText]:
        """Return all texts but the subscriber's own."""
        parts = (part for origin, part in self.parts.items() if origin != subscriber)
        return [text for part in parts for text in unpack(part, "a block of draft text")]


async def put_block(block: Block) -> Any:
    """Put a block into Ray's object store, which workers on one machine share.

    Returns:
        A reference, which Ray resolves where it is an argument of an actor's call. The store keeps
        the block for as long as there is a reference.
    """
    return await asyncio.to_thread(lambda: ray.put(block.packed()))
