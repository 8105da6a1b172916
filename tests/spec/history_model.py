"""A history by brute force, stories of what happens to one, and a draft of one request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from paceline.spec.history import Drafts, Reader

PROBLEMS = ("red", "blue")
tokens = st.lists(st.integers(0, 2), max_size=10)


def count(sequences: list[list[int]], text: Sequence[int]) -> int:
    wanted, size = list(text), len(text)
    return sum(
        sequence[start : start + size] == wanted
        for sequence in sequences
        for start in range(len(sequence) - size + 1)
    )


def favourite(sequences: list[list[int]], text: Sequence[int]) -> int | None:
    """What most often follows the text, the smallest token on a tie."""
    following = Counter(
        sequence[start + len(text)]
        for sequence in sequences
        for start in range(len(sequence) - len(text))
        if sequence[start : start + len(text)] == list(text)
    )
    return min(following, key=lambda token: (-following[token], token), default=None)


@dataclass
class Model:
    """A window of generations of one problem, each a list of sequences, searched by hand."""

    window: int
    generations: dict[int, dict[str, list[int]]] = field(default_factory=dict)
    first_allowed: int = -100
    forgotten: int = -100

    def of(self, number: int) -> dict[str, list[int]] | None:
        """The generation to write to, if there is a place for it."""
        if number not in self.generations:
            oldest = min(self.generations, default=number)
            is_full = len(self.generations) == self.window
            if number < max(self.first_allowed, self.forgotten) or (is_full and number < oldest):
                return None
            if is_full:
                self.drop(oldest)
            self.generations[number] = {}
        return self.generations[number]

    def drop(self, number: int) -> None:
        del self.generations[number]
        # Of a problem of which nothing is left, nothing is remembered either.
        self.first_allowed = number + 1 if self.generations else -100

    def forget(self, before: int) -> None:
        self.forgotten = max(self.forgotten, before)
        for number in sorted(self.generations):
            if number < before:
                self.drop(number)

    def propose(
        self, context: list[int], max_draft: int, max_match: int, decay: float
    ) -> tuple[int, list[int], list[float]]:
        voters: list[tuple[list[list[int]], float, list[int]]] = []
        longest = 1
        for age, number in enumerate(sorted(self.generations, reverse=True)):
            sequences = list(self.generations[number].values())
            for size in range(min(len(context), max_match), longest - 1, -1):
                suffix = context[-size:]
                if favourite(sequences, suffix) is not None:
                    voters = voters if size == longest else []
                    longest = size
                    voters.append((sequences, decay**age, suffix))
                    break
        match = longest if voters else 0
        draft: list[int] = []
        probabilities: list[float] = []
        while len(draft) < max_draft:
            votes: dict[int, float] = {}
            choices = [favourite(sequences, text) for sequences, _, text in voters]
            for (sequences, weight, text), choice in zip(voters, choices, strict=True):
                if choice is not None:
                    votes[choice] = votes.get(choice, 0) + weight * count(
                        sequences, [*text, choice]
                    )
            if not votes:
                break
            winner = max(
                votes, key=lambda token: votes[token]
            )  # the first, so the newest, on a tie
            everything = sum(weight * count(sequences, text) for sequences, weight, text in voters)
            draft.append(winner)
            probabilities.append(votes[winner] / everything)
            voters = [
                (sequences, weight, [*text, winner])
                for (sequences, weight, text), choice in zip(voters, choices, strict=True)
                if choice == winner
            ]
        return match, draft, probabilities


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[object, ...]]:
    """Learning, forgetting and drafting, as they may follow each other."""
    generation = st.integers(0, 5)
    problem = st.sampled_from(PROBLEMS)
    name = st.sampled_from(["a", "b"])
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("add"), problem, generation, tokens),
                st.tuples(st.just("extend"), problem, generation, name, tokens),
                st.tuples(st.just("end"), problem, generation, name),
                st.tuples(st.just("forget"), generation),
                st.tuples(st.just("propose"), st.lists(tokens, min_size=2, max_size=2)),
            ),
            max_size=25,
        )
    )


def draft_for(reader: Reader, problem: str, context: list[int], **options: object) -> Drafts:
    request = reader.open(problem)
    try:
        return reader.propose([request], [context], 8, **options)  # type: ignore[arg-type]
    finally:
        reader.close(request)
