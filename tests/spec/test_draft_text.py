from __future__ import annotations

import numpy as np

from paceline.configs.vocabulary import Completion, VersionSpan, WeightVersion
from paceline.spec.draft_text import OVERLAP_TOKENS, problem_name, sampled_texts


def spans(*ends):
    starts = (0, *ends[:-1])
    return tuple(
        VersionSpan(WeightVersion(3 + i), start, end)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    )


def test_each_version_has_what_it_sampled_and_a_little_of_what_came_before():
    tokens = np.arange(50, dtype=np.int32)
    completion = Completion(tokens, np.zeros(50, np.float32), spans(20, 50), "stop")
    old, new = sampled_texts((1, 2), completion)
    assert (old.version, new.version) == (3, 4)
    assert old.token_ids.tolist() == [1, 2, *range(20)]
    assert new.token_ids.tolist() == list(range(20 - OVERLAP_TOKENS, 50))


def test_a_text_begins_with_the_end_of_its_prompt():
    completion = Completion(np.array([7], np.int32), np.zeros(1, np.float32), spans(1), "stop")
    (text,) = sampled_texts(tuple(range(100)), completion)
    assert text.token_ids.tolist() == [*range(100 - OVERLAP_TOKENS, 100), 7]


def test_a_segment_has_what_it_added_to_what_earlier_segments_left():
    tokens = np.arange(90, dtype=np.int32)
    completion = Completion(tokens, np.zeros(90, np.float32), spans(20, 60, 90), "stop")
    added, newer = sampled_texts((1, 2), completion, first=50)
    assert (added.version, newer.version) == (4, 5)
    assert added.token_ids.tolist() == list(range(50 - OVERLAP_TOKENS, 60))
    assert newer.token_ids.tolist() == list(range(60 - OVERLAP_TOKENS, 90))
    assert list(sampled_texts((1, 2), completion, first=90)) == []


def test_problems_are_named_by_their_tokens_alone():
    assert problem_name((1, 2)) == problem_name((1, 2))
    assert len({problem_name(p) for p in [(1, 2), (12,), (2, 1), (1, 2, 0)]}) == 4
