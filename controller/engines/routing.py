"""Routing of requests to workers (pure): load in tokens, warm prefix caches, no starvation.

- A request weighs what it may come to occupy: the positions of context (prompt, earlier segments,
  and what this one may add) of each sample that is still open. Requests go where the fewest tokens
  are outstanding.
- The worker that sampled a prompt before has it in its prefix cache, and is preferred unless that
  puts it further ahead of the least loaded than the request itself weighs.
- A worker holds at most ``most_samples``: what its engine decodes together and a quarter ahead, so
  that a place in the batch never stays empty; the rest waits where it can still go anywhere.
- Each worker serves waiting requests in the order of arrival: none is given a seat that an earlier
  one waits for, so every seat drains until the earlier one fits.

Example, two workers of which 0 has 300 tokens outstanding and 1 has 100: a request of 150 tokens
whose prompt worker 0 has sampled goes to worker 1 (300 > 100 + 150); one of 250 tokens to worker 0.

>>> loads = {0: Load(samples=2, tokens=300), 1: Load(samples=1, tokens=100)}
>>> [choose(Demand(Load(1, tokens), prompt=7), loads, limit=8, home=0) for tokens in (150, 250)]
[1, 0]
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paceline.configs.vocabulary import RolloutRequest

SAMPLES_AHEAD = 0.25
"""Samples a worker holds beyond those its engine decodes together, as a share of the latter."""
REMEMBERED_PROMPTS = 65536
"""Prompts whose last worker is remembered."""


@dataclass(frozen=True)
class Load:
    """Outstanding samples, and tokens (positions of context) they may come to occupy."""

    samples: int = 0
    tokens: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.samples + other.samples, self.tokens + other.tokens)

    def __sub__(self, other: Load) -> Load:
        return Load(self.samples - other.samples, self.tokens - other.tokens)


@dataclass(frozen=True)
class Demand:
    """Requirements of a request: its load, the prompt's key, and the one seat it may go to."""

    load: Load
    prompt: int
    only: int | None = None


def demand_of(request: RolloutRequest, only: int | None = None) -> Demand:
    """Return a request's demand. A hash tells prompts apart: a collision costs a cache miss."""
    most = request.sampling.max_tokens
    segment = request.segment_tokens or most
    prompt = len(request.prompt_token_ids)
    if request.scores:
        segment, earlier = 0, [len(each.token_ids) for each in request.partial]
    elif request.partial:
        earlier = [len(each.token_ids) for each in request.partial if not each.is_finished]
    else:
        earlier = [0] * request.num_samples
    tokens = sum(prompt + min(most, length + segment) for length in earlier)
    return Demand(Load(len(earlier), tokens), hash(request.prompt_token_ids), only)


def most_samples(max_num_seqs: int) -> int:
    """Return how many samples a worker may hold whose engine decodes ``max_num_seqs`` together."""
    return max_num_seqs + math.ceil(SAMPLES_AHEAD * max_num_seqs)


class Affinity:
    """The seat that sampled each prompt last, and whether it was too slow for it.

    Prompts that were not requested for the longest are forgotten.
    """

    def __init__(self, capacity: int = REMEMBERED_PROMPTS) -> None:
        self._capacity = capacity
        self._seats: OrderedDict[int, tuple[int, bool]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seats)

    def home(self, prompt: int) -> int | None:
        """Return the seat whose prefix cache may hold the prompt."""
        seat, was_slow = self._seats.get(prompt, (None, False))
        return None if was_slow else seat

    def slow_seat(self, prompt: int) -> int | None:
        """Return the seat that had the prompt for too long."""
        seat, was_slow = self._seats.get(prompt, (None, False))
        return seat if was_slow else None

    def remember(self, prompt: int, seat: int, was_slow: bool = False) -> None:
        """Note the seat that samples a prompt, or was too slow at it."""
        self._seats[prompt] = seat, was_slow
        self._seats.move_to_end(prompt)
        if len(self._seats) > self._capacity:
            self._seats.popitem(last=False)


def acceptable(demand: Demand, serving: Iterable[int], affinity: Affinity) -> set[int]:
    """Return seats a request may go to: one that was too slow only if no other serves."""
    seats = set(serving)
    if demand.only is not None:
        return seats & {demand.only}
    return seats - {affinity.slow_seat(demand.prompt)} or seats


def choose(
    demand: Demand, loads: Mapping[int, Load], limit: int, home: int | None = None
) -> int | None:
    """Choose the seat for a request among those of ``loads``; None if none has room.

    An idle worker has room for any request, however many samples it asks for.
    """
    room = {
        seat: load.tokens
        for seat, load in loads.items()
        if not load.samples or load.samples + demand.load.samples <= limit
    }
    if not room:
        return None
    least = min(room, key=lambda seat: (room[seat], seat))
    if home in room and room[home] <= room[least] + demand.load.tokens:
        return home
    return least


def next_placement(
    waiting: Iterable[Demand], loads: Mapping[int, Load], limit: int, affinity: Affinity
) -> tuple[int, int] | None:
    """Find the first request in the queue that can be placed; return its place there and its seat.

    ``loads`` are those of all serving seats. Returns None if all requests must go on waiting.
    """
    free = dict(loads)
    for position, demand in enumerate(waiting):
        if not free:
            return None
        seats = acceptable(demand, loads, affinity)
        candidates = {seat: load for seat, load in free.items() if seat in seats}
        seat = choose(demand, candidates, limit, affinity.home(demand.prompt))
        if seat is not None:
            return position, seat
        for taken in candidates:
            del free[taken]
    return None
