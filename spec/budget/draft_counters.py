"""Running totals of drafting, which an engine reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DraftCounters:
    """Running totals, except ``drafter_bytes``, the drafter's memory now.

    A *round* is a request in a step that drafted for it; it is *cold* where the drafter had no
    draft. *Siblings* are samples of the same prompt by the weights now served, finished or not;
    *history* are those of older weights, and texts from files. ``num_accepted_*`` count drafted
    tokens that the model accepted.
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
        """Count a round that drafted ``num_tokens``."""
        self.num_rounds += 1
        if sibling:
            self.num_drafted_siblings += num_tokens
        else:
            self.num_drafted_history += num_tokens

    def count_accepted(self, num_tokens: int, sibling: bool) -> None:
        """Count ``num_tokens`` accepted tokens of a round."""
        if sibling:
            self.num_accepted_siblings += num_tokens
        else:
            self.num_accepted_history += num_tokens
