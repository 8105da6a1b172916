"""A rank says where it is while it works: pass, microbatch, collectives begun."""

from __future__ import annotations

import pytest

from tests.learner import ranks
from tests.learner.conftest import random_batch


def test_a_step_tells_its_microbatches_one_by_one_and_nothing_once_it_is_over(on_ranks):
    [(seen, after)] = on_ranks(1, ranks.progress_of_a_step, random_batch())
    num = len(seen)
    assert num > 1
    told = [f"update 1 of 1, policy, microbatch {i} of {num}" for i in range(1, num + 1)]
    assert [progress.doing for progress in seen] == told
    assert (after.doing, after.version, after.collectives) == ("", 1, {})


@pytest.mark.slow
def test_ranks_count_the_same_collectives_ever_more_of_them_and_none_of_a_save(on_ranks, tmp_path):
    batch = random_batch()
    (seen, after), (_, others_after) = on_ranks(2, ranks.progress_of_a_step, batch)
    counts = [progress.collectives["0,1#0"] for progress in [*seen, after]]
    assert counts == sorted(set(counts))
    assert after.collectives["0,1#0"] == others_after.collectives["0,1#0"]
    folder = str(tmp_path / "checkpoint")
    unsaved, saved = on_ranks(2, ranks.collectives_of_a_save, batch, folder)[0]
    assert saved == unsaved
