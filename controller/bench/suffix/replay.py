"""Rollouts sampled once more with drafts: how many tokens are accepted, how long drafting takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from paceline.controller.bench.suffix.drafters import Drafter
from paceline.controller.bench.suffix.streams import Rollouts, Tokens


class _Sample(NamedTuple):
    """Problem and tokens int32 [C] that a request will turn out to have."""

    problem: int
    tokens: Tokens


@dataclass
class Replay:
    """Outcome of drafting for some samples.

    A round is one draft for one request. ``microseconds`` are those a request of each batch that
    was full.
    """

    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    microseconds: list[float] = field(default_factory=list)


@dataclass
class _Live:
    request: int
    tokens: Tokens
    num_sampled: int

    @property
    def num_left(self) -> int:
        return self.tokens.size - self.num_sampled


def replay(
    drafter: Drafter,
    rollouts: Rollouts,
    generation: int,
    problems: range,
    batch_size: int,
    found: Replay,
) -> None:
    """Let ``drafter`` draft for a generation's samples while they come into being.

    ``batch_size`` samples are on their way at once, and another begins when one ends. In a round
    each gets the accepted beginning of its draft and the token after that, as by a verifier that
    samples what was sampled then; no draft reaches beyond the last but one token of its sample.
    """
    waiting = deque(
        _Sample(problem, tokens)
        for problem in problems
        for tokens in rollouts.tokens[generation][problem]
    )
    running: list[_Live] = []
    while waiting or running:
        while waiting and len(running) < batch_size:
            running.append(_begin(drafter, rollouts, generation, waiting.popleft()))
        drafted = drafter.propose([live.request for live in running])
        if len(running) == batch_size:
            found.microseconds.append(1e6 * drafted.seconds / batch_size)
        for live, draft in zip(running, drafted.drafts, strict=True):
            _verify(live, draft, found, drafter)
        for live in running:
            if live.num_left == 0:
                drafter.close(live.request)
        running = [live for live in running if live.num_left]


def num_right(draft: Sequence[int], tokens: Tokens) -> int:
    """Count the tokens at the beginning of a draft that are those of the text."""
    count = 0
    for drafted, sampled in zip(draft, tokens.tolist(), strict=False):
        if drafted != sampled:
            break
        count += 1
    return count


def _begin(drafter: Drafter, rollouts: Rollouts, generation: int, sample: _Sample) -> _Live:
    """Open a request with its first token, which comes with the prompt and is never drafted."""
    prompt = rollouts.prompts[sample.problem]
    live = _Live(drafter.open(str(sample.problem), generation, prompt), sample.tokens, 1)
    drafter.sampled(live.request, sample.tokens[:1])
    return live


def _verify(live: _Live, draft: Sequence[int], found: Replay, drafter: Drafter) -> None:
    if live.num_left == 0:  # a sample of one token
        return
    useful = draft[: live.num_left - 1]
    following = live.tokens[live.num_sampled : live.num_sampled + len(useful) + 1]
    accepted = num_right(useful, following)
    found.num_rounds += 1
    found.num_drafted += len(useful)
    found.num_accepted += accepted
    drafter.sampled(live.request, following[: accepted + 1])
    live.num_sampled += accepted + 1
