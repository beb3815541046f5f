"""What arrived, on its way from the receiver's thread to the assembler's: a bounded memory in front of the journal.

What does not fit is left out here and read back from the journal, in the same order. A restart begins the same way:
with everything on disk and nothing in memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from sidestep.worker.intake.assembly import Journaled, journaled
from sidestep.worker.intake.segments import Segments

_READ_MESSAGES: Final = 1_000
MAX_EVENTS: Final = 65_536
"""Events that wait; of refused numbers, those beyond it are left to the assembler's deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloArrived:
    """A rank of this incarnation said Hello, and the index holds it; or a table that was asked for has come."""

    run_id: str
    incarnation: str


class Refused(NamedTuple):
    """This sequence number will never come."""

    run_id: str
    incarnation: str
    rank: int
    sequence: int


Event: TypeAlias = HelloArrived | Refused


class Feed:
    """Journaled messages in the order of their arrival, and events beside them."""

    def __init__(self, segments: Segments, *, limit_bytes: int, start_arrival: int) -> None:
        """Begin with the messages on disk from ``start_arrival`` on."""
        self._segments = segments
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._messages: deque[tuple[Journaled, int]] = deque()
        self._events: deque[Event] = deque()
        self._held_bytes = 0
        self._next_arrival = start_arrival
        self._is_behind = start_arrival < segments.next_arrival
        self.read_back = 0
        """Messages that were read from the journal, a restart's included."""

        self.left_out = 0
        """Refused numbers that nobody was told of, because too many waited."""

    @property
    def next_arrival(self) -> int:
        """Arrival number before which everything has been taken."""
        return self._next_arrival

    @property
    def held_bytes(self) -> int:
        """Memory that the messages here take, by what ``offer`` was told."""
        return self._held_bytes

    def offer(self, messages: Sequence[tuple[Journaled, int]]) -> None:
        """Add messages that have just been committed, each with the memory in bytes that it takes."""
        total_bytes = sum([size_bytes for _, size_bytes in messages])
        with self._lock:
            fits = not self._is_behind and self._held_bytes + total_bytes <= self._limit_bytes
            if messages and fits and messages[0][0].arrival >= self._next_arrival:  # their arrivals ascend
                self._messages.extend(messages)
                self._held_bytes += total_bytes
                messages = ()
            for each, size_bytes in messages:
                if self._is_behind or self._held_bytes + size_bytes > self._limit_bytes:
                    self._is_behind = True
                elif each.arrival >= self._next_arrival:
                    self._messages.append((each, size_bytes))
                    self._held_bytes += size_bytes
        self._arrived.set()

    def tell(self, event: Event) -> None:
        """Add an event."""
        if isinstance(event, Refused) and len(self._events) >= MAX_EVENTS:
            self.left_out += 1
            return
        self._events.append(event)
        self._arrived.set()

    def wake(self) -> None:
        """Let ``wait`` return."""
        self._arrived.set()

    def wait(self, timeout_seconds: float) -> None:
        """Return when something has come, or after the timeout."""
        self._arrived.wait(timeout_seconds)
        self._arrived.clear()

    def take_events(self) -> list[Event]:
        """Return the events since the last call."""
        events: list[Event] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def take(self, limit: int = _READ_MESSAGES) -> list[Journaled]:
        """Return the next messages, ``limit`` at most.

        Raises:
            JournalError: what has to be read back cannot be.
        """
        with self._lock:
            pop = self._messages.popleft
            found = [pop() for _ in range(min(limit, len(self._messages)))]
            self._held_bytes -= sum([size_bytes for _, size_bytes in found])
            taken = [each for each, _ in found]
            if not taken and self._is_behind:
                taken = [journaled(row) for row in self._segments.since(self._next_arrival, limit)]
                self._is_behind = bool(taken)
                self.read_back += len(taken)
            if taken:
                self._next_arrival = taken[-1].arrival + 1
            return taken
