"""Descriptions that were checked once are known again, and nothing else is taken for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sidestep.protocol import array_frame
from sidestep.protocol.errors import DecodeError

ARRAYS: dict[str, NDArray[Any]] = {"a": np.arange(4, dtype=np.int32), "b": np.ones((2, 3)), "c": np.zeros(0, np.uint8)}
DESCRIPTIONS = (("a", "int32", (4,)), ("b", "float64", (2, 3)), ("c", "uint8", (0,)))


def _body() -> bytes:
    return b"".join(array_frame.pack(ARRAYS)[1])


def test_the_same_arrays_come_out_each_time_wherever_the_body_begins() -> None:
    for body_at in (0, 8, 24):
        found = array_frame.unpack(DESCRIPTIONS, bytes(body_at) + _body(), body_at)
        assert list(found) == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


@pytest.mark.parametrize(
    "descriptions",
    [
        (("a", "int32", (4.0,)), *DESCRIPTIONS[1:]),
        (*DESCRIPTIONS[:2], ("c", "uint8", (False,))),
        (*DESCRIPTIONS[:2], ("c", "uint8", (0.0,))),
        (*DESCRIPTIONS[:2], ("c", {"uint8": 1}, (0,))),
        (*DESCRIPTIONS[:2], ("c", "uint8", [0])),
        (*DESCRIPTIONS[:2], ("c", "uint8")),
        (*DESCRIPTIONS, ("a", "uint8", (0,))),
    ],
)
def test_what_only_equals_known_descriptions_is_refused(descriptions: Any) -> None:
    array_frame.unpack(DESCRIPTIONS, _body())
    with pytest.raises(DecodeError):
        array_frame.unpack(descriptions, _body())


@pytest.mark.parametrize("change", [-8, 8])
def test_known_descriptions_do_not_fit_a_body_of_another_length(change: int) -> None:
    array_frame.unpack(DESCRIPTIONS, _body())
    with pytest.raises(DecodeError, match=r"arrived|behind the last"):
        array_frame.unpack(DESCRIPTIONS, _body()[:change] if change < 0 else _body() + bytes(change))


def test_many_layouts_do_not_pile_up() -> None:
    for length in range(2_000):
        array_frame.unpack((("a", "uint8", (length,)),), bytes(length + -length % 8))
    assert len(array_frame._LAYOUTS) <= array_frame._MAX_LAYOUTS
