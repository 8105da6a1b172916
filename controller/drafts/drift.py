"""Policy drift: how far the policy went since a version, and dropping text from too far away."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

from paceline.configs.errors import ConfigError
from paceline.configs.vocabulary import Group, StepReport, WeightVersion
from paceline.controller.groups.assembly import AssembledBatch


class PolicyDrift:
    """Estimate of which versions are within ``max_nats`` of the newest, added up over steps.

    A step reports the mean of KL(behaviour || current) over its tokens, which versions of several
    ages sampled. Nearby, a divergence is half the square of a (Fisher) distance, and a policy that
    goes a distance d a version is a * d away from what it was a versions ago: the mean is d^2/2
    times the mean of a^2. What distances of successive versions add up to is at least the distance
    between first and last, so versions are dropped rather too early: the more so the more the
    policy goes back and forth.

    Entry v of ``distances`` leads to version v + 1. A step on tokens of the current version alone
    measures nothing: it counts as the last.
    """

    def __init__(self, max_nats: float) -> None:
        self._max_nats = max_nats
        self.distances: list[float] = []

    def resume(self, version: int, distances: Sequence[float]) -> None:
        """Continue from a version, with the distances that led there; unknown ones count as 0."""
        self.distances = [0.0] * (version - len(distances)) + list(distances)

    def observe(self, kl: float, mean_square_age: float) -> None:
        """Add the step that made the next version; ``kl`` in nats a token, ages in versions."""
        if mean_square_age > 0 and math.isfinite(kl):
            self.distances.append(math.sqrt(2 * max(0.0, kl) / mean_square_age))
        else:
            self.distances.append(self.distances[-1] if self.distances else 0.0)

    def oldest_near(self) -> int:
        """Return the oldest version that is still near the newest."""
        gone = accumulate(reversed(self.distances))
        near = sum(distance**2 / 2 <= self._max_nats for distance in gone)
        return len(self.distances) - near


class DriftWindow:
    """Observer of training steps that has versions dropped once they are too far away."""

    def __init__(self, drift: PolicyDrift, drop_before: Callable[[int], None]) -> None:
        self._drift = drift
        self._drop_before = drop_before
        self._oldest = drift.oldest_near()

    def observe(self, batch: AssembledBatch, report: StepReport) -> Mapping[str, float]:
        """Add a step; return metrics to record of it.

        Raises:
            ConfigError: the algorithm does not report how far it is from what sampled.
        """
        if "kl" not in report.metrics:
            raise ConfigError(
                "rollout.drafting.max_drift needs the metric kl of each step, and the algorithm "
                f"reports {', '.join(sorted(report.metrics))}: set max_drift to null"
            )
        age = mean_square_age(batch.groups, WeightVersion(batch.step))
        self._drift.observe(report.metrics["kl"], age)
        oldest = self._drift.oldest_near()
        if oldest > self._oldest:
            self._oldest = oldest
            self._drop_before(oldest)
        return {"draft_versions_near": float(len(self._drift.distances) + 1 - self._oldest)}


def mean_square_age(groups: Iterable[Group], version: WeightVersion) -> float:
    """Return the mean square of sampled tokens' ages at a version; 0 without tokens."""
    total = squares = 0
    for group in groups:
        for sample in group.samples:
            for span in sample.completion.versions:
                total += span.end - span.start
                squares += (span.end - span.start) * (version - span.version) ** 2
    return squares / total if total else 0.0
