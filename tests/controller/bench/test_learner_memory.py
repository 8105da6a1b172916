from __future__ import annotations

import pytest

from paceline.controller.bench.harness.resident_memory import (
    forget_peak,
    peak_bytes,
    resident_bytes,
)
from paceline.controller.bench.learner.memory import (
    CHUNKS,
    PLAIN,
    SequenceMemory,
    longest_within,
    measure_memory,
)

MIB = 2**20


def test_the_longest_sequence_is_where_the_line_through_the_peaks_reaches_the_memory() -> None:
    assert longest_within(1000 * MIB, {100: 200 * MIB, 200: 300 * MIB}) == 900
    assert longest_within(150 * MIB, {100: 200 * MIB, 200: 300 * MIB}) == 50


def test_what_a_process_held_at_most_is_seen_after_it_is_gone_until_it_is_forgotten() -> None:
    forget_peak()
    base = resident_bytes()
    held = b"x" * (200 * MIB)
    del held
    assert peak_bytes() - base > 190 * MIB
    forget_peak()
    assert peak_bytes() - base < 20 * MIB


def test_the_table_says_how_many_times_the_plain_steps_sequence_fits() -> None:
    peaks = {PLAIN: {10: 20 * MIB, 20: 40 * MIB}, CHUNKS: {10: 10 * MIB, 20: 11 * MIB}}
    found = SequenceMemory(peaks, 60 * MIB, {PLAIN: 30, CHUNKS: 510})
    assert found.times_plain(CHUNKS) == 17
    assert found.table().rows[1] == (CHUNKS, "10: 10, 20: 11", "102.4", "510", "17.0")


@pytest.mark.slow
def test_a_sequence_in_chunks_is_at_least_twice_and_a_half_as_long_as_a_plain_one(tmp_path) -> None:
    assert measure_memory(True, tmp_path).times_plain(CHUNKS) >= 2.5
