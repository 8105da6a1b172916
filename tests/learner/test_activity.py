"""What a rank says of itself while it works."""

import pytest

from paceline.learner.activity import Activity


def test_what_is_under_way_is_said_by_the_innermost_block_and_nothing_between_two():
    activity = Activity()
    with activity.during("passes over the batch"):
        with activity.during("evaluation"):
            activity.tell("evaluated 2 microbatches")
            assert activity.now == "evaluated 2 microbatches"
        assert activity.now == "passes over the batch"
    assert activity.now == ""


def test_a_block_that_fails_is_not_under_way_any_more():
    activity = Activity()
    with pytest.raises(MemoryError), activity.during("optimiser"):
        raise MemoryError
    assert activity.now == ""
