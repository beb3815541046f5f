"""Arrays as raw little-endian bytes, described in the head and laid one after another behind it.

A view of the received frame is returned, nothing is copied; it pins the frame for as long as it lives. Every length
is checked against what really arrived before an array is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

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
    arrays: dict[str, NDArray[Any]] = {}
    offset, end = body_at, len(frame)
    for entry in descriptions:
        name, dtype, shape = _description(entry)
        count = shape[0] if len(shape) == 1 else math.prod(shape)
        num_bytes = count * dtype.itemsize
        if num_bytes > MAX_MESSAGE_BYTES:
            raise LimitExceededError(f"array {name[:64]!r} declares {num_bytes} bytes, more than {MAX_MESSAGE_BYTES}")
        if offset + num_bytes > end:
            raise DecodeError(f"array {name[:64]!r} declares {num_bytes} bytes, {end - offset} arrived")
        if name in arrays:
            raise DecodeError(f"array {name[:64]!r} is described twice")
        flat = np.frombuffer(frame, dtype, count, offset)
        arrays[name] = flat if len(shape) == 1 else flat.reshape(shape)
        offset += num_bytes + -num_bytes % ALIGNMENT_BYTES
    if offset != end:
        raise DecodeError(f"{end - offset} bytes behind the last array")
    return arrays


def total_bytes(buffers: Iterable[bytes]) -> int:
    """Return the length of ``buffers`` joined."""
    return sum(map(len, buffers))
