"""The benchmark of the buffer drives the real one, within its bound, and leaves nothing behind."""

from __future__ import annotations

import pytest

from paceline.controller.bench import buffer
from paceline.controller.bench.buffer import Case, Measured, measure

GROUP_BYTES = 4 * 1564 * 8


@pytest.mark.parametrize("store", ["memory", "sqlite", "redis"])
def test_a_case_lives_its_groups_within_the_bound_and_leaves_nothing_behind(
    store, tmp_path, monkeypatch
):
    monkeypatch.setattr(buffer, "MOST_FINISHED", 100)
    monkeypatch.setattr(buffer, "NUM_WORKERS", 40)
    found = measure(Case(store, outstanding=300, num_groups=960), tmp_path)
    assert found.groups_per_second > 0
    assert found.cpu_microseconds > 0
    assert 0 < found.most_sample_bytes <= 100 * GROUP_BYTES
    assert list(tmp_path.iterdir()) == []


def test_a_group_weighs_fifty_kilobytes():
    assert buffer._group().num_bytes == GROUP_BYTES
    assert 49_000 < GROUP_BYTES < 51_000


def test_each_store_has_a_target_and_the_cost_a_group_must_be_flat():
    def measured(rate, cpu):
        return Measured(rate, cpu, 50 << 20, 150 << 20, 10**8)

    rates = {"memory": 30_000.0, "sqlite": 1_000.0, "redis": 6_000.0}
    found = {name: [measured(rate, 40.0)] for name, rate in rates.items()}
    growth = {
        n: measured(30_000.0, cpu) for n, cpu in zip(buffer.OUTSTANDING, (30, 35, 40), strict=True)
    }
    result = buffer._result(found, growth)
    met = {what: target.met for what, target in result.targets.items()}
    assert met == {
        "memory, groups/s": True,
        "sqlite, groups/s": False,
        "redis, groups/s": True,
        "CPU a group, 100,000 over 1,000 outstanding": True,
    }
