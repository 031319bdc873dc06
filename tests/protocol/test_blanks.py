"""csrc/protocol/blanks.h: what fills a blank is not one, and what it was can be told from it."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ep_backend import _native

ALL_ONES = 0xFFFFFFFF


def float32_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]  # type: ignore[no-any-return]


@given(st.integers(0, ALL_ONES - 1))
@example(0)
@example(ALL_ONES - 1)
def test_a_word_comes_as_it_was_and_is_no_blank_on_the_way(word: int) -> None:
    assert _native.filling(word) != 0
    assert _native.filled(_native.filling(word)) == word


def test_the_word_that_would_make_a_blank_comes_as_another_nan_of_either_dtype() -> None:
    assert _native.filling(ALL_ONES) != 0
    word = _native.filled(_native.filling(ALL_ONES))
    for bits in (ALL_ONES, word):
        # As one float32, and as two bfloat16, whose bits are a float32's upper half.
        for number in (bits, bits & 0xFFFF0000, bits << 16 & ALL_ONES):
            assert math.isnan(float32_of(number))


@pytest.mark.parametrize("word", [-1, ALL_ONES + 1])
def test_only_32_bits_are_a_word(word: int) -> None:
    with pytest.raises(TypeError):
        _native.filling(word)
