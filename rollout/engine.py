"""The protocol of an inference engine, as the rollout worker uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from paceline.configs.vocabulary import Completion, DraftText, RolloutRequest, WeightVersion
from paceline.weights_sync.handle import WeightHandle


@dataclass(frozen=True)
class RolloutResult:
    """All completions of one request, in sample order, each whole: earlier segments included."""

    request_id: str
    completions: tuple[Completion, ...]


class Engine(Protocol):
    """A continuous-batching engine that is stepped by its owner, on one thread.

    Weights change only between two steps, so every sampled token has exactly one version.
    """

    @property
    def version(self) -> WeightVersion | None:
        """Version served now; None until the first update: such an engine must not serve."""

    @property
    def checksum(self) -> int | None:
        """xxh3-64 of the bytes that version was loaded from; None if none were loaded."""

    def add(self, request: RolloutRequest) -> None:
        """Queue a request, new or to be continued; a `UserError` says why one cannot be served."""

    def step(self) -> list[RolloutResult]:
        """Run one forward pass over the running batch; return requests whose segments ended."""

    @property
    def draft_counters(self) -> Mapping[str, float]:
        """Running totals of drafting; empty where nothing is drafted."""

    def has_work(self) -> bool:
        """Return whether any request has not been answered."""

    def interrupt(self, request_id: str) -> RolloutResult | None:
        """Abort a request and return what it has; None if it is not here any more."""

    def update_weights(self, handle: WeightHandle) -> list[RolloutResult]:
        """Load the published version, to be served from the next step on.

        Depending on `rollout.on_weight_update`, running requests continue with it or are aborted;
        those aborted are returned.
        """

    def add_draft_text(self, texts: Sequence[DraftText]) -> None:
        """Draft from these completions too; does nothing in an engine that does not draft."""

    def drop_draft_text(self, before: int) -> None:
        """Stop drafting from completions of versions before ``before``: the policy moved away."""
