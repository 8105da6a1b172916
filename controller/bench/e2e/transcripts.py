"""A task whose answers have a long tail of lengths: labelled digits, written out one by one."""

from __future__ import annotations

import string

import numpy as np

from paceline.configs.errors import ConfigError
from paceline.configs.vocabulary import Record

LABELS = string.ascii_letters


class Transcripts:
    """Labelled digits to be written out again: ``a4b9c2`` is answered ``a4 b9 c2``.

    The number of digits is log-normal with the given ``median`` and ``sigma`` (standard deviation
    of its logarithm), at least 1 and at most ``max_terms``: most answers are short and a few are
    many times longer, as in reasoning. The task is easy, for what it serves is timing. A prompt
    source for ``data.source.type: import``, of ``num_records`` problems or without end.
    """

    def __init__(
        self,
        median: float,
        sigma: float,
        max_terms: int,
        seed: int = 0,
        num_records: int | None = None,
    ) -> None:
        if not 1 <= max_terms <= len(LABELS):
            raise ConfigError(f"max_terms must lie in 1 to {len(LABELS)}, got {max_terms}")
        self._location, self._sigma = float(np.log(median)), sigma
        self._max_terms = max_terms
        self._seed = seed
        self.num_records = num_records

    def record(self, index: int) -> Record:
        """Return the problem of this index; its answer is the reference too."""
        if self.num_records is not None:
            epoch, place = divmod(index, self.num_records)
            index = int(
                np.random.default_rng([self._seed, epoch]).permutation(self.num_records)[place]
            )
        random = np.random.default_rng([self._seed, index])
        drawn = round(float(random.lognormal(self._location, self._sigma)))
        digits = random.integers(0, 10, size=min(max(drawn, 1), self._max_terms))
        terms = [f"{label}{digit}" for label, digit in zip(LABELS, digits, strict=False)]
        question, answer = "".join(terms), " ".join(terms)
        return Record(f"transcripts/{index}", {"question": question, "answer": answer}, answer)
