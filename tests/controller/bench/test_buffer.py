"""The benchmark of the buffer drives the real one, within its bound, and leaves nothing behind."""

from __future__ import annotations

import pytest

from paceline.controller.bench import buffer
from paceline.controller.bench.buffer import CPU, RATE, Life, measure

GROUP_BYTES = 4 * 1564 * 8


@pytest.mark.parametrize("store", ["memory", "sqlite", "redis"])
def test_a_store_lives_its_groups_within_the_bound_and_leaves_nothing_behind(
    store, tmp_path, monkeypatch
):
    monkeypatch.setattr(buffer, "MOST_FINISHED", 100)
    monkeypatch.setattr(buffer, "NUM_WORKERS", 40)
    found = measure(Life(store, outstanding=300, num_groups=960), tmp_path)
    assert found[RATE] > 0
    assert found[CPU] > 0
    assert 0 < found["most samples held, MB"] <= 100 * GROUP_BYTES / 1e6
    assert list(tmp_path.iterdir()) == []


def test_a_group_weighs_fifty_kilobytes():
    assert buffer._group().num_bytes == GROUP_BYTES
    assert 49_000 < GROUP_BYTES < 51_000
