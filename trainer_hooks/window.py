"""Messages that have been sent and are not acked: pinned, kept as the very bytes that left, resent in order."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Kind
from sidestep.protocol.ranges import RangeSet
from sidestep.trainer_hooks.courtesy import in_pieces

_PARCEL_OVERHEAD_BYTES = 192
_FRAME_OVERHEAD_BYTES = 48


@dataclass(slots=True, eq=False)
class Parcel:
    """One encoded message: a frame, or the frames of its chunks."""

    sequence: int
    kind: Kind
    frames: tuple[bytes, ...]
    step: int = -1
    """The step that it is a part of; -1 where it is no part of one."""
    settled: bool = False
    """True once it was acked or refused; nothing more of it is sent."""
    size_bytes: int = field(init=False)
    """Bytes of its frames and of the Python objects around them, which small messages are mostly made of."""

    def __post_init__(self) -> None:
        """Measure it once; its frames never change."""
        self.size_bytes = _PARCEL_OVERHEAD_BYTES + sum(map(len, self.frames)) + _FRAME_OVERHEAD_BYTES * len(self.frames)


class Window:
    """Unacked messages by sequence number, and which of them this connection still has to carry."""

    def __init__(self) -> None:
        """Start empty."""
        self._parcels: dict[int, Parcel] = {}
        self._outgoing: deque[Parcel] = deque()
        self._frame_at = 0
        self.size_bytes = 0
        """Bytes of all unacked messages."""
        self.counts: Counter[Kind] = Counter()
        """Unacked messages per kind."""
        self.num_resends = 0
        """Messages that were queued again after a Welcome."""

    def __len__(self) -> int:
        """Return how many messages are unacked."""
        return len(self._parcels)

    @property
    def num_outgoing(self) -> int:
        """Messages that this connection has yet to carry; some of them may have been settled since."""
        return len(self._outgoing)

    def pin(self, parcel: Parcel) -> None:
        """Hold ``parcel`` until it is acked or refused, and send it next; sequence numbers only grow."""
        self._parcels[parcel.sequence] = parcel
        self._outgoing.append(parcel)
        self.size_bytes += parcel.size_bytes
        self.counts[parcel.kind] += 1

    def next_frame(self) -> bytes | None:
        """Return the frame to send next, or None when this connection has carried all that is pinned."""
        while self._outgoing and self._outgoing[0].settled:
            self._outgoing.popleft()
            self._frame_at = 0
        return self._outgoing[0].frames[self._frame_at] if self._outgoing else None

    def frame_sent(self) -> None:
        """Go on to the frame after the one that ``next_frame`` returned."""
        self._frame_at += 1
        if self._frame_at == len(self._outgoing[0].frames):
            self._outgoing.popleft()
            self._frame_at = 0

    def resend(self) -> None:
        """Send everything unacked again, in order, from its first frame: the connection is another one."""
        self.num_resends += len(self._parcels) - len(self._outgoing)
        self._outgoing = deque(self._parcels.values())
        self._frame_at = 0

    def acknowledge(self, committed: NDArray[np.int64]) -> list[Parcel]:
        """Forget and return what the inclusive ranges ``committed`` [n, 2] hold.

        Raises:
            ValueError: not ranges.
        """
        if not len(committed) or not self._parcels:
            return []
        ranges = RangeSet.from_ranges(committed)
        highest = int(committed[:, 1].max())
        done = []
        for sequence in in_pieces(self._parcels):  # ascending, so that nothing behind the highest range is looked at
            if sequence > highest:
                break
            if sequence in ranges:
                done.append(sequence)
        return [self._settle(sequence) for sequence in in_pieces(done)]

    def refuse(self, sequence: int) -> Parcel | None:
        """Forget and return the message ``sequence``; None where it is not pinned."""
        return self._settle(sequence) if sequence in self._parcels else None

    def clear(self) -> list[Parcel]:
        """Forget and return everything."""
        return [self._settle(sequence) for sequence in list(self._parcels)]

    def _settle(self, sequence: int) -> Parcel:
        parcel = self._parcels.pop(sequence)
        parcel.settled = True
        self.size_bytes -= parcel.size_bytes
        self.counts[parcel.kind] -= 1
        return parcel
