"""What rollout engines draft from, and how they are told of each other's samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from paceline.configs.schema import RunConfig
from paceline.configs.schema.rollout import RolloutConfig
from paceline.configs.schema.store import RedisStoreConfig
from paceline.configs.vocabulary import Trace
from paceline.controller.data.tokenizer import encode
from paceline.controller.drafts.blocks import RayChannel, RedisChannel, TraceChannel
from paceline.controller.drafts.corpus import TraceArchive
from paceline.controller.drafts.exchange import TraceExchange
from paceline.controller.drafts.files import TraceReader
from paceline.controller.ledger.opening import password_of
from paceline.spec.trace_file import pack, unpack
from paceline.spec.traces import given_trace, traces_of

DRAFTER_BYTES_PER_TOKEN = 60
"""About what an engine's drafter needs for a token: what it has no room for is not kept for it."""


def given_traces(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Trace, ...]:
    """Return what engines are to draft from at the start.

    Raises:
        DataError: a file is missing, or a line of it holds no trace.
    """
    drafting = config.rollout.drafting
    if drafting is None:
        return ()
    reader = TraceReader(
        functools.partial(encode, tokenizer, special_tokens=not config.data.source.chat),
        functools.partial(encode, tokenizer, special_tokens=False),
        int(tokenizer.eos_token_id),
        len(tokenizer),
        given_trace,
    )
    paths = (Path(path).expanduser() for path in drafting.traces)
    return tuple(trace for path in paths for trace in reader.read(path))


def trace_exchange(config: RunConfig, given: Sequence[Trace]) -> TraceExchange | None:
    """Build what tells drafting engines of each other's samples; it knows what was given."""
    drafting = config.rollout.drafting
    if drafting is None:
        return None
    channel: TraceChannel = RayChannel(pack, unpack)
    if isinstance(config.store, RedisStoreConfig):
        password = password_of(config.store)
        channel = RedisChannel(config.store.url, password, config.name, pack, unpack)
    max_tokens = (drafting.max_memory_mb << 20) // DRAFTER_BYTES_PER_TOKEN
    archive = TraceArchive(drafting.window, max_tokens)
    exchange = TraceExchange(archive, channel, traces_of, max_tokens)
    exchange.give(given)
    return exchange


def with_draft_budget(config: RunConfig) -> RolloutConfig:
    """Return the engines' settings; what drafts are to shorten follows from how the run is paced.

    Where training waits for its batch, that is the batch's makespan. Where it runs behind, what
    ends is followed by other prompts, and every token that comes sooner is trained sooner.
    """
    drafting = config.rollout.drafting
    if drafting is None or drafting.budget is not None:
        return config.rollout
    budget = "throughput" if config.loop.max_lag else "makespan"
    drafting = drafting.model_copy(update={"budget": budget})
    return config.rollout.model_copy(update={"drafting": drafting})
