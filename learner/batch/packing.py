"""Which rank trains which bundles of samples, and in which microbatches (pure, numpy only).

Bundles go to ranks by cost (longest processing time first; attention is quadratic in length, the
rest linear). First fit decreasing says how many microbatches the fullest rank needs; every rank
runs as many, because each is a collective operation, and a pipeline wants some more, to have work
for all of its stages. On a rank bundles are then balanced over its microbatches by cost, the
costliest microbatch first: ranks that run their i-th one together wait little for each other. A
microbatch is empty only on a rank with fewer bundles than microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paceline.configs.errors import ConfigError

BundleIndices = tuple[int, ...]
"""The bundles of a microbatch, by index; empty where a rank has nothing to do."""


def plan_packing(
    sizes: Sequence[int],
    costs: Sequence[float],
    num_ranks: int,
    capacity: int,
    *,
    fewest: int = 1,
    multiple_of: int = 1,
) -> list[list[BundleIndices]]:
    """Divide bundles over ranks and microbatches.

    Args:
        sizes: what each takes of a microbatch, all positive.
        costs: how long each takes to train, in any unit.
        num_ranks: data-parallel ranks.
        capacity: room of a microbatch (``learner.tokens_per_microbatch``).
        fewest, multiple_of: how many microbatches a rank needs at least, and in what steps.

    Returns:
        For every rank its microbatches, as many on every rank; together they hold each bundle once.

    Raises:
        ConfigError: something is larger than ``capacity``.
    """
    if max(sizes, default=0) > capacity:
        raise ConfigError(
            f"a sample of {max(sizes)} tokens does not fit learner.tokens_per_microbatch "
            f"({capacity}): raise it to model.max_length"
        )
    by_cost, by_size = np.asarray(costs, dtype=np.float64), np.asarray(sizes)
    shares = _balance(by_cost, num_ranks)
    ranks = [_first_fit(share, by_size, capacity) for share in shares]
    num_microbatches = max(fewest, *(len(microbatches) for microbatches in ranks))
    num_microbatches = math.ceil(num_microbatches / multiple_of) * multiple_of
    return [
        _balanced_fit(share, by_cost, by_size, capacity, num_microbatches)
        or _costliest_first(_split_up_to(microbatches, num_microbatches), by_cost)
        for share, microbatches in zip(shares, ranks, strict=True)
    ]


def imbalance(plan: Sequence[Sequence[BundleIndices]], costs: Sequence[float]) -> float:
    """Share of the ranks' time that is spent waiting for the slowest in each microbatch, by cost.

    ``1 - mean over ranks of all costs / sum over microbatches of the largest``; 0 is perfect.
    """
    table = np.array([[sum(costs[i] for i in some) for some in rank] for rank in plan])
    slowest = float(table.max(axis=0).sum())
    return 1 - float(table.sum(axis=1).mean()) / slowest if slowest else 0.0


def _balance(costs: NDArray[np.float64], num_ranks: int) -> list[list[int]]:
    """Give indices to ranks, costliest first, each to the rank with the least cost so far."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = np.zeros(num_ranks)
    for index in np.argsort(-costs, kind="stable"):
        rank = int(totals.argmin())
        shares[rank].append(int(index))
        totals[rank] += costs[index]
    return shares


def _first_fit(
    indices: Sequence[int], sizes: NDArray[np.int64], capacity: int
) -> list[BundleIndices]:
    """Put indices, largest first, into the first microbatch with room."""
    microbatches: list[list[int]] = []
    room = np.zeros(len(indices), dtype=np.int64)
    for index in sorted(indices, key=lambda i: -sizes[i]):
        fits = room[: len(microbatches)] >= sizes[index]
        place = int(fits.argmax()) if fits.any() else len(microbatches)
        if place == len(microbatches):
            microbatches.append([])
            room[place] = capacity
        microbatches[place].append(index)
        room[place] -= sizes[index]
    return [tuple(microbatch) for microbatch in microbatches]


def _balanced_fit(
    indices: Sequence[int],
    costs: NDArray[np.float64],
    sizes: NDArray[np.int64],
    capacity: int,
    number: int,
) -> list[BundleIndices] | None:
    """Put costliest first into the microbatch with the least cost that has room; None if one finds
    none, though there might be another way."""
    microbatches: list[list[int]] = [[] for _ in range(number)]
    totals, room = np.zeros(number), np.full(number, capacity)
    for index in sorted(indices, key=lambda i: (-costs[i], -sizes[i], i)):
        fits = room >= sizes[index]
        if not fits.any():
            return None
        # an empty one first, even where costs are nothing
        places = np.lexsort((room < capacity, np.where(fits, totals, np.inf)))
        place = int(places[0])
        microbatches[place].append(index)
        totals[place] += costs[index]
        room[place] -= sizes[index]
    return _costliest_first([tuple(microbatch) for microbatch in microbatches], costs)


def _costliest_first(
    microbatches: Sequence[BundleIndices], costs: NDArray[np.float64]
) -> list[BundleIndices]:
    return sorted(microbatches, key=lambda some: (-sum(costs[i] for i in some), not some))


def _split_up_to(microbatches: list[BundleIndices], number: int) -> list[BundleIndices]:
    """Halve the most numerous microbatch until there are ``number``; then add empty ones."""
    parts = list(microbatches)
    while len(parts) < number:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]), default=None)
        if largest is None or len(parts[largest]) < 2:
            parts.append(())
            continue
        whole = parts.pop(largest)
        # every second one, so that both halves keep the mixture of sizes
        parts += [whole[0::2], whole[1::2]]
    return parts
