"""What all messages are made of: kinds, lanes, the types of their array fields, and their base.

The messages themselves are in ``messages.py`` and ``signals.py``; everybody imports them from ``messages.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Dtype (numpy's name) and number of axes of an array field."""

    dtype: str
    axes: int


Uint8Array: TypeAlias = Annotated[NDArray[np.uint8], ArraySpec("uint8", 1)]
UInt16Array: TypeAlias = Annotated[NDArray[np.uint16], ArraySpec("uint16", 1)]
Int32Array: TypeAlias = Annotated[NDArray[np.int32], ArraySpec("int32", 1)]
Int32Matrix: TypeAlias = Annotated[NDArray[np.int32], ArraySpec("int32", 2)]
Int64Array: TypeAlias = Annotated[NDArray[np.int64], ArraySpec("int64", 1)]
Int64Matrix: TypeAlias = Annotated[NDArray[np.int64], ArraySpec("int64", 2)]
Float16Array: TypeAlias = Annotated[NDArray[np.float16], ArraySpec("float16", 1)]
Float32Array: TypeAlias = Annotated[NDArray[np.float32], ArraySpec("float32", 1)]
Float64Array: TypeAlias = Annotated[NDArray[np.float64], ArraySpec("float64", 1)]

Json: TypeAlias = Any
"""A free-form value of None, bool, int, float, str, bytes, list and dict with text keys, within ``limits.py``."""


class Kind(IntEnum):
    """The number of a kind on the wire. A number is never used again for another kind."""

    HELLO = 1
    BLOB = 2
    TOKENS = 3
    LOSSES = 4
    GRADIENTS = 5
    ANSWERS = 6
    GENERATION = 7
    LEARNING_RATES = 8
    SCALARS = 9
    STEP_END = 10
    HEARTBEAT = 11
    GOODBYE = 12
    NOTICE = 13
    SIGNALS = 14
    PROBE = 15
    CHUNK = 31
    WELCOME = 32
    ACK = 33
    NO_ACK = 34
    REFUSE = 35
    REJECT = 36
    COMMAND = 37


COMMAND_TAKEN, COMMAND_LATE = "command-taken:", "command-late:"
"""Codes of the notices by which a trainer answers a ``Command``, the command's id behind them."""


class Lane(IntEnum):
    """How dear a message is: when the window is full the highest number goes first (docs/delivery.md, section 5)."""

    CONTROL = 0
    LOSS = 1
    STATISTICS = 2
    TABLES = 3


class Role(IntEnum):
    """Bits that say what a labelled position is within its answer (``Losses.roles``)."""

    FIRST = 1
    """The answer's first labelled position."""
    LATER = 2
    """Another position up to and with the answer's first EOS."""
    CONTENT = 4
    """A position before the answer's first EOS."""


def empty(dtype: type[np.generic], axes: int = 1) -> NDArray[Any]:
    """Return an array without elements, the default of an array field."""
    return np.zeros((0,) * axes, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Base of all messages."""

    kind: ClassVar[Kind]
    lane: ClassVar[Lane] = Lane.CONTROL
