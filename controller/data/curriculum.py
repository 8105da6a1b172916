"""Curriculum: which of the feed's prompts are worth sampling now, by how well they went before.

A prompt that always or never succeeds gives a group without a gradient. What an earlier epoch, or a
neighbour of like difficulty, told of it is known before it is sampled, and saves the sampling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from paceline.configs.errors import ConfigError
from paceline.configs.schema.data import CurriculumConfig
from paceline.configs.vocabulary import Prompt


class GroupOutcome(NamedTuple):
    """The outcome of a group: its prompt and the mean of its samples' rewards."""

    prompt: Prompt
    reward: float


@dataclass(slots=True)
class Estimate:
    """The mean reward to be expected at a difficulty, from ``count`` groups."""

    mean: float = 0.0
    count: int = 0

    def observe(self, reward: float, newest_weight: float) -> None:
        """Take in a group: the plain mean of the first few, then an exponential one."""
        self.count += 1
        self.mean += max(newest_weight, 1 / self.count) * (reward - self.mean)


class Curriculum:
    """A filter over the positions of the feed, from a running estimate for each difficulty.

    It decides at a position and changes nothing there: which prompt a position names stays as it
    is, and two curricula that observed the same outcomes decide alike everywhere. It holds
    ``max_keys`` estimates; the one that was observed the longest ago is forgotten.
    """

    def __init__(self, config: CurriculumConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._estimates: OrderedDict[str, Estimate] = OrderedDict()
        self._reset()

    def admits(self, position: int, prompt: Prompt, num_passed: int) -> bool:
        """Return whether to sample the prompt here, after ``num_passed`` that were passed over."""
        admitted = (
            num_passed >= self._config.max_passed
            or self._is_wanted(self._estimates.get(difficulty(self._config, prompt)))
            or _coin(self._seed, position) < self._config.keep_outside
        )
        self._num_admitted += admitted
        self._num_passed += not admitted
        return admitted

    def observe(self, outcomes: Iterable[GroupOutcome]) -> None:
        """Learn from how groups went."""
        for outcome in outcomes:
            key = difficulty(self._config, outcome.prompt)
            estimate = self._estimates.setdefault(key, Estimate())
            estimate.observe(outcome.reward, self._config.newest_weight)
            self._estimates.move_to_end(key)
            self._num_observed += 1
            self._num_on_target += self._is_on_target(outcome.reward)
            if len(self._estimates) > self._config.max_keys:
                self._estimates.popitem(last=False)

    def read_and_reset(self) -> dict[str, float]:
        """Return metrics since the last call: positions passed over, groups that were on target.

        Both as shares; and how many difficulties are known.
        """
        metrics = {
            "curriculum_passed": self._num_passed / max(1, self._num_passed + self._num_admitted),
            "curriculum_on_target": self._num_on_target / max(1, self._num_observed),
            "curriculum_known": float(len(self._estimates)),
        }
        self._reset()
        return metrics

    def state(self) -> list[list[Any]]:
        """Return the estimates as plain values for JSON, the one observed last at the end."""
        return [[key, found.mean, found.count] for key, found in self._estimates.items()]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Know what the curriculum knew whose ``state`` this is."""
        self._estimates = OrderedDict(
            (str(key), Estimate(float(mean), int(count))) for key, mean, count in state
        )

    def _is_wanted(self, estimate: Estimate | None) -> bool:
        if estimate is None or estimate.count < self._config.min_groups:
            return True
        return self._is_on_target(estimate.mean)

    def _is_on_target(self, reward: float) -> bool:
        low, high = self._config.target
        return low <= reward <= high

    def _reset(self) -> None:
        self._num_admitted = self._num_passed = self._num_observed = self._num_on_target = 0


def difficulty(config: CurriculumConfig, prompt: Prompt) -> str:
    """Return the key under which prompts of one difficulty are counted together.

    Records that lack the field named by ``key`` are one difficulty of their own.
    """
    if config.key == "prompt":
        return prompt.id
    if config.key == "prompt_length":
        return str(len(prompt.token_ids) // config.length_bucket)
    return str(prompt.metadata.get(config.key))


def require_fitting(
    config: CurriculumConfig, num_records: int | None, fields: Mapping[str, Any]
) -> None:
    """Refuse a key that tells nothing of later prompts; ``fields`` are those of a record.

    Raises:
        ConfigError: prompts never come again, or the records lack the field.
    """
    if config.key == "prompt" and num_records is None:
        raise ConfigError(
            "data.curriculum.key: prompt counts prompts that come again, and those of this source "
            f"never do; use prompt_length or a field of the records ({', '.join(sorted(fields))})"
        )
    if config.key not in ("prompt", "prompt_length", *fields):
        raise ConfigError(
            f"data.curriculum.key: got {config.key!r}, expected prompt, prompt_length or a field "
            f"of the records: {', '.join(sorted(fields))}"
        )


def _coin(seed: int, position: int) -> float:
    """Return a number in [0, 1) that belongs to the position: thrown again, it is the same."""
    return (xxhash.xxh3_64_intdigest(f"{seed}/{position}".encode()) >> 11) / 2**53
