"""The draft text of rollout engines: from files, and from each other's samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from paceline.configs.schema import RunConfig
from paceline.configs.schema.rollout import RolloutConfig
from paceline.configs.vocabulary import DraftText
from paceline.controller.data.tokenizer import encode
from paceline.controller.drafts.blocks import put_block
from paceline.controller.drafts.corpus import DraftCorpus
from paceline.controller.drafts.files import DraftFileReader
from paceline.controller.drafts.publisher import DraftPublisher

DRAFTER_BYTES_PER_TOKEN = 60
"""Bytes an engine's drafter needs for a token, about: the corpus holds what fits into them."""


def external_draft_texts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[DraftText, ...]:
    """Return the completions of files that engines are to draft from at the start.

    Raises:
        DataError: a file is missing, or a line of it holds no completion.
    """
    drafting = config.rollout.drafting
    if drafting is None:
        return ()
    reader = DraftFileReader(
        functools.partial(encode, tokenizer, special_tokens=not config.data.source.chat),
        functools.partial(encode, tokenizer, special_tokens=False),
        int(tokenizer.eos_token_id),
        len(tokenizer),
    )
    paths = (Path(path).expanduser() for path in drafting.corpus)
    return tuple(text for path in paths for text in reader.read(path))


def draft_publisher(config: RunConfig, texts: Sequence[DraftText]) -> DraftPublisher | None:
    """Return the publisher of draft text, with ``texts`` in its corpus; None without drafting."""
    drafting = config.rollout.drafting
    if drafting is None:
        return None
    max_tokens = (drafting.max_memory_mb << 20) // DRAFTER_BYTES_PER_TOKEN
    publisher = DraftPublisher(DraftCorpus(drafting.window, max_tokens), put_block, max_tokens)
    publisher.preload(texts)
    return publisher


def with_draft_budget(config: RunConfig) -> RolloutConfig:
    """Return the engines' settings, with what drafts are to shorten by how the run is paced.

    Where training waits for its batch, that is the batch's makespan. Where it runs behind, what
    ends is followed by other prompts, and every token that comes sooner is trained sooner.
    """
    drafting = config.rollout.drafting
    if drafting is None or drafting.budget is not None:
        return config.rollout
    budget = "throughput" if config.loop.max_lag else "makespan"
    drafting = drafting.model_copy(update={"budget": budget})
    return config.rollout.model_copy(update={"drafting": drafting})
