from __future__ import annotations

import numpy as np
import pytest

from paceline.configs.errors import ConfigError
from paceline.controller.bench.e2e.transcripts import Transcripts


def source(seed: int = 0) -> Transcripts:
    return Transcripts(median=9, sigma=0.75, max_terms=52, seed=seed)


def test_an_answer_is_its_question_term_by_term() -> None:
    for index in range(50):
        record = source().record(index)
        terms = str(record.reference).split(" ")

        assert "".join(terms) == record.fields["question"]
        assert all(len(term) == 2 and term[0].isalpha() and term[1].isdigit() for term in terms)
        assert len({term[0] for term in terms}) == len(terms)
        assert record.fields["answer"] == record.reference


def test_an_index_is_the_same_problem_for_ever_and_seeds_differ() -> None:
    assert source().record(3) == source().record(3)
    assert source().record(3) != source().record(4)
    assert source(0).record(3) != source(1).record(3)


def test_so_many_problems_come_again_in_another_order() -> None:
    few = Transcripts(median=9, sigma=0.75, max_terms=52, num_records=20)
    first, second = ([few.record(start + i).id for i in range(20)] for start in (0, 20))
    assert len(set(first)) == 20
    assert sorted(first) == sorted(second) and first != second


def test_lengths_have_a_long_tail() -> None:
    lengths = np.array([len(source().record(index).fields["answer"]) for index in range(2000)])

    assert 20 <= np.median(lengths) <= 30
    assert np.percentile(lengths, 99) >= 4 * np.median(lengths)
    assert lengths.max() < 160


def test_more_terms_than_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 52, got 53"):
        Transcripts(median=9, sigma=0.75, max_terms=53)
