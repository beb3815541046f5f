"""Arrays as raw little-endian bytes, described in the head and laid one after another behind it.

A view of the received frame is returned, nothing is copied; it pins the frame for as long as it lives. Every length
is checked against what really arrived before an array is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.errors import DecodeError, EncodeError, LimitExceededError
from sidestep.protocol.limits import MAX_ARRAY_DIMENSIONS, MAX_ARRAYS, MAX_MESSAGE_BYTES
from sidestep.protocol.messages import ArraySpec

ALIGNMENT_BYTES = 8
"""Every array starts at a multiple of this, counted from the start of the frame."""

WIRE_DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
    )
}
"""The dtypes that may travel. Objects, text and structured dtypes never do."""


def padding(num_bytes: int) -> int:
    """Return how many zero bytes follow ``num_bytes`` up to the next aligned offset."""
    return -num_bytes % ALIGNMENT_BYTES


def check_array(name: str, value: object, spec: ArraySpec) -> NDArray[Any]:
    """Return ``value`` as a contiguous little-endian array of ``spec``.

    Raises:
        EncodeError: it is no array, or of another dtype or number of axes.
    """
    if not isinstance(value, np.ndarray) or value.dtype.name != spec.dtype or value.ndim != spec.axes:
        got = f"{value.dtype}[{value.ndim} axes]" if isinstance(value, np.ndarray) else type(value).__name__
        raise EncodeError(f"{name} is {got}, not an array of {spec.dtype} with {spec.axes} axes")
    return np.ascontiguousarray(value, WIRE_DTYPES[spec.dtype])


def pack(arrays: Mapping[str, NDArray[Any]]) -> tuple[list[tuple[str, str, list[int]]], list[bytes]]:
    """Describe ``arrays`` for the head and return their bytes, each padded to the alignment."""
    descriptions = [(name, array.dtype.name, list(array.shape)) for name, array in arrays.items()]
    buffers: list[bytes] = []
    for array in arrays.values():
        buffers += [array.tobytes(), bytes(padding(array.nbytes))]
    return descriptions, buffers


def _description(entry: object) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    if type(entry) is not tuple or len(entry) < 3:
        raise DecodeError("an array's description is not a list of name, dtype and shape")
    name, dtype, shape = entry[:3]
    if type(name) is not str or type(dtype) is not str or dtype not in WIRE_DTYPES:
        raise DecodeError(f"the dtype {str(dtype)[:64]!r} of array {str(name)[:64]!r} may not travel")
    if type(shape) is not tuple:
        raise DecodeError(f"the shape of array {name[:64]!r} is no list")
    if len(shape) > MAX_ARRAY_DIMENSIONS:
        raise LimitExceededError(f"array {name[:64]!r} has {len(shape)} axes, more than {MAX_ARRAY_DIMENSIONS}")
    for axis in shape:
        if type(axis) is not int or axis < 0:
            raise DecodeError(f"the shape of array {name[:64]!r} is not a list of lengths")
        if axis > MAX_MESSAGE_BYTES:
            raise LimitExceededError(f"array {name[:64]!r} has an axis of more than {MAX_MESSAGE_BYTES} entries")
    return name, WIRE_DTYPES[dtype], shape


class _Layout(NamedTuple):
    """What descriptions say that have been checked once: where each array lies behind the head."""

    arrays: tuple[tuple[str, np.dtype[Any], int, int, tuple[int, ...] | None], ...]
    """Name, dtype, entries, offset from the body's begin; the shape where it has not one axis."""
    body_bytes: int


_LAYOUTS: Final[dict[tuple[object, ...], _Layout]] = {}
"""Descriptions to their layout: a kind's messages are described alike, step after step and rank by rank."""
_MAX_LAYOUTS: Final = 512
_MAX_NAME: Final = 64
"""Characters of a name that is remembered; ours are shorter."""


def unpack(descriptions: object, frame: bytes | bytearray | memoryview, body_at: int = 0) -> dict[str, NDArray[Any]]:
    """Return views of what ``frame`` has from ``body_at`` on as the described arrays.

    Raises:
        LimitExceededError: more arrays, axes or bytes than ``limits.py`` allows.
        DecodeError: a description is malformed, or does not fit the bytes that arrived.
    """
    if type(descriptions) is not tuple:
        raise DecodeError("the head's arrays are not a list")
    if len(descriptions) > MAX_ARRAYS:
        raise LimitExceededError(f"{len(descriptions)} arrays in one message, more than {MAX_ARRAYS}")
    is_plain = _are_plain(descriptions)
    layout = _LAYOUTS.get(descriptions) if is_plain else None
    if layout is None or body_at + layout.body_bytes != len(frame):
        layout = _layout(descriptions, len(frame) - body_at)
        if is_plain:
            if len(_LAYOUTS) >= _MAX_LAYOUTS:
                _LAYOUTS.clear()
            _LAYOUTS[descriptions] = layout
    view = np.frombuffer
    return {
        name: view(frame, dtype, count, body_at + offset)
        if shape is None
        else view(frame, dtype, count, body_at + offset).reshape(shape)
        for name, dtype, count, offset, shape in layout.arrays
    }


def _are_plain(descriptions: tuple[object, ...]) -> bool:
    """Whether each is two texts and whole lengths: then an equal one is the same one, as 1 and True are not."""
    for entry in descriptions:
        if type(entry) is not tuple or len(entry) != 3:
            return False
        name, dtype, shape = entry
        if (
            type(name) is not str
            or type(dtype) is not str
            or type(shape) is not tuple
            or max(len(name), len(dtype)) > _MAX_NAME
        ):
            return False
        for axis in shape:
            if type(axis) is not int:
                return False
    return True


def _layout(descriptions: tuple[object, ...], held_bytes: int) -> _Layout:
    """Check descriptions one by one against each other and ``held_bytes``; raises as ``unpack``."""
    arrays: dict[str, tuple[str, np.dtype[Any], int, int, tuple[int, ...] | None]] = {}
    offset = 0
    for entry in descriptions:
        name, dtype, shape = _description(entry)
        count = shape[0] if len(shape) == 1 else math.prod(shape)
        num_bytes = count * dtype.itemsize
        if num_bytes > MAX_MESSAGE_BYTES:
            raise LimitExceededError(f"array {name[:64]!r} declares {num_bytes} bytes, more than {MAX_MESSAGE_BYTES}")
        if offset + num_bytes > held_bytes:
            raise DecodeError(f"array {name[:64]!r} declares {num_bytes} bytes, {held_bytes - offset} arrived")
        if name in arrays:
            raise DecodeError(f"array {name[:64]!r} is described twice")
        arrays[name] = (name, dtype, count, offset, None if len(shape) == 1 else shape)
        offset += num_bytes + -num_bytes % ALIGNMENT_BYTES
    if offset != held_bytes:
        raise DecodeError(f"{held_bytes - offset} bytes behind the last array")
    return _Layout(tuple(arrays.values()), offset)


def total_bytes(buffers: Iterable[bytes]) -> int:
    """Return the length of ``buffers`` joined."""
    return sum(map(len, buffers))
