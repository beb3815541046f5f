"""RangeSet against a plain set, whatever the order of arrival."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.protocol.ranges import RangeSet

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=30)


@given(SPANS)
def test_a_range_set_holds_what_a_set_holds(spans: list[tuple[int, int]]) -> None:
    ranges, plain = RangeSet(), set[int]()
    for first, length in spans:
        ranges.add_range(first, first + length)
        plain |= set(range(first, first + length + 1))
    assert sorted(plain) == list(ranges)
    assert len(ranges) == len(plain)
    assert all((number in ranges) == (number in plain) for number in range(-2, 72))
    pairs = ranges.ranges()
    assert (pairs[1:, 0] > pairs[:-1, 1] + 1).all(), "ranges touch or overlap"
    assert RangeSet.from_ranges(pairs) == ranges


@given(st.lists(st.integers(0, 40), max_size=40), st.integers(0, 40), st.integers(0, 10))
def test_covers_says_whether_every_number_is_there(numbers: list[int], first: int, length: int) -> None:
    ranges = RangeSet(numbers)
    assert ranges.covers(first, first + length) == set(numbers).issuperset(range(first, first + length + 1))


@given(st.lists(st.integers(0, 20), max_size=40))
def test_add_says_whether_a_number_is_new(numbers: list[int]) -> None:
    ranges, seen = RangeSet(), set[int]()
    for number in numbers:
        assert ranges.add(number) == (number not in seen)
        seen.add(number)


def test_a_range_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="ends before"):
        RangeSet.from_ranges(np.array([[3, 2]], np.int64))
