"""What drafting did, as running totals that an engine reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DraftCounters:
    """Running totals, but for ``drafter_bytes``, which is what the drafter's memory holds now.

    A *round* is a request in a step that drafted for it; it is *cold* where nothing was known to
    draft. *Siblings* are samples of the same prompt by the weights now served, finished or not;
    *history* are those of older ones, and texts from files. ``num_accepted`` and what it
    is made of count drafted tokens that the model sampled.
    """

    num_draft_steps: int = 0
    num_drafting_steps: int = 0
    num_rounds: int = 0
    num_cold_rounds: int = 0
    num_drafted_siblings: int = 0
    num_drafted_history: int = 0
    num_accepted_siblings: int = 0
    num_accepted_history: int = 0
    seconds_proposing: float = 0.0
    seconds_drafting_steps: float = 0.0
    seconds_without_drafts: float = 0.0
    drafter_bytes: int = 0

    def count_draft(self, num_tokens: int, sibling: bool) -> None:
        """A round that drafted ``num_tokens``."""
        self.num_rounds += 1
        if sibling:
            self.num_drafted_siblings += num_tokens
        else:
            self.num_drafted_history += num_tokens

    def count_accepted(self, num_tokens: int, sibling: bool) -> None:
        """What came of it."""
        if sibling:
            self.num_accepted_siblings += num_tokens
        else:
            self.num_accepted_history += num_tokens
