"""The walk over msgpack agrees with the unpacker on what is one whole value."""

from __future__ import annotations

import contextlib

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.protocol.errors import DecodeError
from sidestep.protocol.packed_bounds import check_packed
from sidestep.protocol.tables import decode_table

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=20)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, (1 << 32) - 1), inner, max_size=20)
    ),
    max_leaves=40,
)


@given(VALUES)
def test_what_was_packed_is_one_value_and_no_part_of_it_is(value: object) -> None:
    packed = msgpack.packb(value)
    check_packed(packed, max_levels=64, max_entries=10_000)
    for wrong in (packed[:-1], packed + b"\0"):
        with pytest.raises(DecodeError):
            check_packed(wrong, max_levels=64, max_entries=10_000)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_table_or_refused(noise: bytes) -> None:
    with contextlib.suppress(DecodeError):
        decode_table(noise)
