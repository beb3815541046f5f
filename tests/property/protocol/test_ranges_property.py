"""RangeSet against a plain set, whatever the order of arrival."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.protocol.limits import MAX_RANGES
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


@given(SPANS, st.sets(st.integers(0, 70), min_size=1).flatmap(lambda some: st.permutations(sorted(some))))
def test_numbers_added_together_are_as_if_added_one_by_one(spans: list[tuple[int, int]], numbers: list[int]) -> None:
    together, alone = RangeSet(), RangeSet()
    for first, length in spans:
        together.add_range(first, first + length)
        alone.add_range(first, first + length)
    together.add_all(numbers)
    for number in numbers:
        alone.add(number)
    assert together == alone


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


@given(st.lists(st.tuples(st.integers(-(1 << 62), 1 << 62), st.integers(0, 1 << 61)), max_size=30), st.randoms())
def test_ranges_are_taken_in_any_order(spans: list[tuple[int, int]], rng: Random) -> None:
    pairs = [(first, min(first + length, (1 << 63) - 1)) for first, length in spans]
    shuffled = pairs.copy()
    rng.shuffle(shuffled)
    made = [RangeSet.from_ranges(np.array(each, np.int64).reshape(-1, 2)) for each in (sorted(pairs), shuffled)]
    assert made[0] == made[1]
    assert all(made[0].covers(*pair) for pair in pairs)


def test_more_ranges_than_an_ack_can_name_are_refused_before_they_are_taken() -> None:
    ranges = np.arange(4 * MAX_RANGES, dtype=np.int64).reshape(-1, 2) * 2
    RangeSet.from_ranges(ranges[:MAX_RANGES])
    with pytest.raises(ValueError, match="more than"):
        RangeSet.from_ranges(ranges)
