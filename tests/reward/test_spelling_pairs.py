"""Pairs of answers of which one is right."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.reward.spelling_pairs import SpellingPairs, misspelt


@given(st.text("abc", min_size=1, max_size=10), st.integers(0, 100))
def test_a_misspelt_answer_is_another_one_of_nearly_the_same_letters(answer, seed):
    found = misspelt(answer, np.random.default_rng(seed))
    assert found != answer
    assert sorted(found) == sorted(answer) or found == answer + answer[-1]


def test_records_hold_both_answers_and_are_the_same_at_every_call():
    source = SpellingPairs({"min_word_len": 3, "max_word_len": 6})
    for index in range(20):
        record = source.record(index)
        assert record.fields["chosen"] == record.reference == record.fields["word"][::-1]
        assert record.fields["rejected"] != record.reference
        assert source.record(index) == record
