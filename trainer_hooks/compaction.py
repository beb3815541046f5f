"""Messages that have to wait, in one piece of memory each.

A message's arrays are made one by one on the training thread, among the large temporaries of a training step. Kept for
long, each of these small pieces holds a hole of the heap open: 12 MiB of waiting messages made the process grow by 112
MiB, and by 13 MiB once they were moved (docs/reliability.md).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Message

_ALIGNMENT_BYTES = 8


def compacted(message: Message) -> Message:
    """Return ``message`` with copies of its arrays that share one allocation, made by the calling thread."""
    arrays: dict[str, NDArray[Any]] = {}
    for entry in fields(message):
        value = getattr(message, entry.name)
        if isinstance(value, np.ndarray):
            arrays[entry.name] = value
    if not arrays:
        return message
    places = {name: -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for name, array in arrays.items()}
    memory = np.empty(sum(places.values()), np.uint8)
    moved: dict[str, Any] = {}
    at = 0
    for name, array in arrays.items():
        view = memory[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
        view[...] = array
        moved[name] = view
        at += places[name]
    return replace(message, **moved)
