"""Packed arrays are what safetensors reads, and come back with their facts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as safetensors

from paceline.configs.packed_arrays import UnreadableError, is_whole, pack_arrays, unpack_arrays

DTYPES = ("<i8", "<i4", "<f4", "<i2", "|u1")


@st.composite
def named_pieces(draw):
    shape = draw(st.lists(st.integers(1, 3), max_size=2))
    return {
        dtype: [
            np.full((rows, *shape), draw(st.integers(0, 100)), dtype)
            for rows in draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
        ]
        for dtype in DTYPES[draw(st.integers(0, len(DTYPES))) :]
    }


@given(named_pieces(), st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_facts_and_arrays_come_back_and_the_library_reads_the_same(arrays, facts):
    content = pack_arrays("things", facts, arrays)
    assert is_whole(content)
    found_facts, found = unpack_arrays("things", content)
    by_library = safetensors.load(content[8:])
    assert found_facts == facts
    assert found.keys() == by_library.keys() == arrays.keys()
    for name, pieces in arrays.items():
        expected = np.concatenate(pieces)
        for array in (found[name], by_library[name]):
            np.testing.assert_array_equal(array, expected)
            assert array.dtype == expected.dtype
            assert array.shape == expected.shape


def test_another_kind_and_other_bytes_are_refused_by_name():
    with pytest.raises(UnreadableError, match="'other things', expected 'things'"):
        unpack_arrays("things", pack_arrays("other things", {}, {}))
    with pytest.raises(UnreadableError, match="no arrays of Paceline"):
        unpack_arrays("things", b"checksum" + b"x" * 100)
    assert not is_whole(b"")
