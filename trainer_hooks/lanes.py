"""Messages that have not been sent yet: first come, first sent; the cheapest lane is given up first."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from sidestep.protocol.messages import Gradients, Kind, Lane, Message

NEVER_DROPPED = frozenset({Kind.STEP_END, Kind.GOODBYE})
"""Without these the worker could not tell a drop from a delay (docs/delivery.md, section 2)."""

_FRAME_OVERHEAD_BYTES = 512
"""Prefix, envelope and accounts of a frame, and the Python objects around an unsent message."""

_ARRAY_OVERHEAD_BYTES = 112
"""A numpy array beside its elements; empty ones have it too."""


def estimate_bytes(value: object) -> int:
    """Return about how many bytes ``value`` takes in memory, which is more than on the wire."""
    if isinstance(value, np.ndarray):
        return value.nbytes + _ARRAY_OVERHEAD_BYTES
    if isinstance(value, (str, bytes)):
        return len(value) + 8
    if isinstance(value, Mapping):
        return 16 + sum(estimate_bytes(key) + estimate_bytes(entry) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return 16 + sum(map(estimate_bytes, value))
    return 16


def estimate_message_bytes(message: Message) -> int:
    """Return about how many bytes ``message`` takes in the window."""
    return _FRAME_OVERHEAD_BYTES + sum(estimate_bytes(getattr(message, entry.name)) for entry in fields(message))


def rank_of(message: Message) -> int:
    """Return how dear ``message`` is, 0 the dearest: by its lane, non-finite gradients with the losses."""
    if message.kind in NEVER_DROPPED:
        return 0
    lane = message.lane
    if isinstance(message, Gradients) and message.nonfinite.any():
        lane = min(lane, Lane.LOSS)
    return lane + 1


@dataclass(slots=True, eq=False)
class Unsent:
    """One message that waits for its first send."""

    message: Message
    size_bytes: int
    arrival: int
    """Its place in the order of arrival over all lanes."""
    rank: int
    """How dear it is: 0 for what is never dropped, then by lane."""


class Lanes:
    """Unsent messages by how dear they are.

    Sent in order of arrival over all lanes, so that a step's parts leave before its ``StepEnd`` and steps close in
    order; the lanes only decide who goes when there is no room.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._queues: tuple[deque[Unsent], ...] = tuple(deque() for _ in range(len(Lane) + 1))
        self._rank_bytes = [0] * len(self._queues)
        self._arrivals = 0
        self.counts: Counter[Kind] = Counter()
        """Unsent messages per kind."""

    @property
    def size_bytes(self) -> int:
        """Estimated bytes of all unsent messages."""
        return sum(self._rank_bytes)

    def __len__(self) -> int:
        """Return how many messages are unsent."""
        return sum(map(len, self._queues))

    def dearer_bytes(self, rank: int) -> int:
        """Return the bytes of what is dearer than ``rank``, and so never makes room for it."""
        return sum(self._rank_bytes[:rank])

    def wrap(self, message: Message) -> Unsent:
        """Return ``message`` with its size and its place in the order; it is not held yet."""
        self._arrivals += 1
        return Unsent(message, estimate_message_bytes(message), self._arrivals, rank_of(message))

    def add(self, unsent: Unsent) -> None:
        """Hold ``unsent``, which is the newest of its rank."""
        self._queues[unsent.rank].append(unsent)
        self._rank_bytes[unsent.rank] += unsent.size_bytes
        self.counts[unsent.message.kind] += 1

    def pop_next(self) -> Unsent | None:
        """Remove and return the message that came first."""
        queues = [queue for queue in self._queues if queue]
        if not queues:
            return None
        return self._pop(min(queues, key=lambda queue: queue[0].arrival))

    def pop_cheapest(self) -> Unsent | None:
        """Remove and return the oldest message of the cheapest lane; None when only what is never dropped is left."""
        for queue in reversed(self._queues[1:]):
            if queue:
                return self._pop(queue)
        return None

    def pop_oldest_step_end(self) -> Unsent | None:
        """Remove and return the oldest of what is never dropped: for a worker that has been away for days."""
        return self._pop(self._queues[0]) if self._queues[0] else None

    def _pop(self, queue: deque[Unsent]) -> Unsent:
        unsent = queue.popleft()
        self._rank_bytes[unsent.rank] -= unsent.size_bytes
        self.counts[unsent.message.kind] -= 1
        return unsent
