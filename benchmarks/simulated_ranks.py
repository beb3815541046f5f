"""Many ranks in one process: a real DEALER socket each, and the conversation of a publisher on it.

Hello, Welcome, blobs that are asked for, data after the Welcome alone, acks, heartbeats every 2 s, all that is unacked
sent again after another Welcome, another connection after 15 s without progress, Goodbye: as
``trainer_hooks/conversation.py`` has it. Sockets are heard by one epoll on ZeroMQ's own descriptors.
"""

from __future__ import annotations

import heapq
import select
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, cast

import zmq
from benchmarks.rank_messages import RankMessages

from sidestep.protocol.frames import decode, encode, split
from sidestep.protocol.limits import (
    MAX_FRAME_BYTES,
    RECEIVE_HIGH_WATER_MARK_MESSAGES,
    SEND_HIGH_WATER_MARK_MESSAGES,
)
from sidestep.protocol.messages import Ack, Blob, Command, Notice, Refuse, Reject, Welcome

HEARTBEAT_STEPS: Final = 2
"""At a step a second: ``Patience.heartbeat_seconds``."""
PROGRESS_SECONDS: Final = 15.0
_READY_SECONDS: Final = 240.0
_LAST_ACKS_SECONDS: Final = 120.0


class SimulatedRank:
    """One rank's stream and connection."""

    def __init__(self, crowd: Crowd, rank: int) -> None:
        """Connect and say Hello."""
        self._crowd = crowd
        self.rank = rank
        self.sequence = 0
        self.is_welcome = False
        self._pending: deque[bytes] = deque()
        self._unacked: deque[tuple[int, bytes]] = deque()
        self._ends: deque[tuple[int, float]] = deque()
        self._given: set[str] = set()
        self._progress_at = time.monotonic()
        self._connect()

    def _connect(self) -> None:
        self.socket = self._crowd.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndhwm = SEND_HIGH_WATER_MARK_MESSAGES
        self.socket.rcvhwm = 4 * RECEIVE_HIGH_WATER_MARK_MESSAGES
        self.socket.maxmsgsize = MAX_FRAME_BYTES
        self.socket.reconnect_ivl, self.socket.reconnect_ivl_max = 100, 1_000
        self.socket.connect(self._crowd.address)
        self.is_welcome = False
        self._pending = deque([self._crowd.messages.hello(self.rank)])
        self._crowd.watch(self)
        self.flush()
        self.hear()

    @property
    def num_unacked(self) -> int:
        """Messages that the worker has not acked."""
        return len(self._unacked)

    @property
    def is_settled(self) -> bool:
        """Whether it may send data, and nothing else waits to be sent."""
        return self.is_welcome and not self._pending

    def send_step(self, step: int, ended_at: float) -> None:
        """Hand a step's messages over; ``ended_at`` is the unix time at which it ended."""
        frames = self._crowd.messages.step(self.rank, step, self.sequence + 1, ended_at)
        for frame in frames:
            self._hand_over(frame)
        self._ends.append((self.sequence, time.monotonic()))
        self.flush()
        self.hear()

    def send_goodbye(self, step: int) -> None:
        """Say the last words."""
        self._hand_over(self._crowd.messages.goodbye(self.rank, self.sequence + 1, step))
        self.flush()
        self.hear()

    def send_heartbeat(self, step: int) -> None:
        """Say that it lives; look whether the worker does."""
        now = time.monotonic()
        if not self._unacked:
            self._progress_at = now
        elif now - self._progress_at > PROGRESS_SECONDS:
            self._crowd.counts["reconnections"] += 1
            self._crowd.forget(self)
            self.socket.close(0)
            self._progress_at = now
            self._connect()
            return
        if self.is_welcome:
            self._pending.append(self._crowd.messages.heartbeat(self.rank, step))
            self.flush()
        self.hear()

    def _hand_over(self, frame: bytes) -> None:
        self.sequence += 1
        self._unacked.append((self.sequence, frame))
        if self.is_welcome:
            self._pending.append(frame)

    def flush(self) -> None:
        """Send what the socket has room for."""
        pending, counts = self._pending, self._crowd.counts
        while pending:
            try:
                self.socket.send(pending[0], zmq.NOBLOCK)
            except zmq.Again:
                self._crowd.blocked.add(self)
                return
            counts["frames"] += 1
            counts["bytes"] += len(pending.popleft())
        self._crowd.blocked.discard(self)

    def hear(self) -> None:
        """Take what the worker says; also after each sending, or ZeroMQ's descriptor tells nothing any more."""
        while cast("int", self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            message = decode(self.socket.recv(zmq.NOBLOCK))[1]
            if isinstance(message, Ack):
                self._acked(message.committed)
                self._give(message.wanted)
            elif isinstance(message, Welcome):
                self._welcomed(message)
            elif isinstance(message, (Refuse, Reject)):
                raise RuntimeError(f"the worker refuses rank {self.rank}: {message.reason}")
            elif isinstance(message, (Notice, Command)):
                self._crowd.counts["notices"] += 1

    def _welcomed(self, welcome: Welcome) -> None:
        self._crowd.counts["welcomes"] += 1
        self._progress_at = time.monotonic()
        self.is_welcome = True
        self._acked(welcome.committed)
        self._crowd.counts["resent"] += len(self._unacked) if self._crowd.has_begun else 0
        self._pending = deque(frame for _, frame in self._unacked)
        self._give(welcome.wanted)
        self.flush()

    def _give(self, wanted: tuple[str, ...]) -> None:
        messages, wanted = self._crowd.messages, tuple(each for each in wanted if each not in self._given)
        self._given.update(wanted)
        for each in wanted:
            envelope = messages.identity(self.rank)
            self._pending.extend(split(envelope, encode(envelope, Blob(digest=each, content=messages.blobs[each]))))
        if wanted:
            self.flush()

    def _acked(self, committed: Any) -> None:
        last = int(committed[0, 1]) if len(committed) and committed[0, 0] == 1 else 0
        now = time.monotonic()
        while self._unacked and self._unacked[0][0] <= last:
            self._unacked.popleft()
            self._progress_at = now
        while self._ends and self._ends[0][0] <= last:
            self._crowd.ack_lags.append(now - self._ends.popleft()[1])


class Crowd:
    """The ranks of one process."""

    def __init__(self, address: str, run_id: str, ranks: range, world_size: int) -> None:
        """Connect them all."""
        self.address = address
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, max(1_023, 2 * len(ranks)))
        self.messages = RankMessages(run_id, world_size)
        self.counts: Counter[str] = Counter()
        self.ack_lags = array("d")
        """Seconds from handing a ``StepEnd`` over to hearing its ack, by each rank and step."""
        self.late_by = array("d")
        """Seconds by which this process sent a rank's step later than it was due: a busy sender, not the worker."""
        self.last_sent_at: dict[int, float] = {}
        """Step to when the last rank here handed its ``StepEnd`` over, on the monotonic clock."""
        self.has_begun = False
        self.blocked: set[SimulatedRank] = set()
        self._epoll = select.epoll(len(ranks))
        self._heard: dict[int, SimulatedRank] = {}
        self.ranks = [SimulatedRank(self, rank) for rank in ranks]

    def watch(self, rank: SimulatedRank) -> None:
        """Hear this rank's socket from now on."""
        descriptor = cast("int", rank.socket.getsockopt(zmq.FD))
        self._heard[descriptor] = rank
        self._epoll.register(descriptor, select.EPOLLIN)

    def forget(self, rank: SimulatedRank) -> None:
        """Do not hear this rank's socket any more; it is about to be closed."""
        descriptor = cast("int", rank.socket.getsockopt(zmq.FD))
        self._epoll.unregister(descriptor)
        del self._heard[descriptor]

    def listen(self, seconds: float) -> None:
        """Hear all sockets for so long at most."""
        for descriptor, _ in self._epoll.poll(max(0.0, seconds)):
            self._heard[descriptor].hear()
        for rank in list(self.blocked):
            rank.flush()
            rank.hear()

    def listen_until(self, is_so: Any, seconds: float, otherwise: str) -> None:
        """Hear all sockets until ``is_so``; raises TimeoutError."""
        until = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > until:
                raise TimeoutError(otherwise)
            self.listen(0.02)

    def train(self, num_steps: int, begin_at: float, interval_seconds: float, spread_seconds: float) -> None:
        """Take ``num_steps`` steps, the first at ``begin_at`` on the monotonic clock.

        A step ends on all ranks at once; each hands it over at its own publisher's tick, within ``spread_seconds``.
        """
        self.has_begun = True
        to_unix = time.time() - time.monotonic()
        for due, what, step, rank in self._agenda(num_steps, interval_seconds, spread_seconds):
            now = time.monotonic()
            while now < begin_at + due:
                self.listen(begin_at + due - now)
                now = time.monotonic()
            if what == "step":
                self.late_by.append(now - begin_at - due)
                rank.send_step(step, begin_at + step * interval_seconds + to_unix)
                self.last_sent_at[step] = time.monotonic()
            else:
                rank.send_heartbeat(step)
            if len(self.late_by) % 16 == 0:
                self.listen(0.0)

    def _agenda(
        self, num_steps: int, interval_seconds: float, spread_seconds: float
    ) -> Iterator[tuple[float, str, int, SimulatedRank]]:
        """Yield what is due when, in seconds from the begin, in order."""
        phases = [(rank.rank * 0.6180339887498949) % 1.0 for rank in self.ranks]
        for step in range(num_steps):
            begins = step * interval_seconds
            of_step = [
                (begins + spread_seconds * phase, "step", step, rank)
                for phase, rank in zip(phases, self.ranks, strict=True)
            ]
            beats = [
                (begins + (spread_seconds + phase * (interval_seconds - spread_seconds)) * 0.999, "beat", step, rank)
                for phase, rank in zip(phases, self.ranks, strict=True)
                if (step + rank.rank) % HEARTBEAT_STEPS == 0
            ]
            yield from heapq.merge(sorted(of_step, key=_due), sorted(beats, key=_due), key=_due)

    def end(self, num_steps: int) -> None:
        """Say goodbye for all ranks and wait for the last ack."""
        for rank in self.ranks:
            rank.send_goodbye(num_steps - 1)
        done = lambda: all(rank.num_unacked == 0 for rank in self.ranks)  # noqa: E731
        self.listen_until(done, _LAST_ACKS_SECONDS, "the worker does not ack everything")

    def close(self) -> None:
        """Close all sockets."""
        self._epoll.close()
        for rank in self.ranks:
            rank.socket.close(0)
        self.context.term()


def _due(each: tuple[float, str, int, SimulatedRank]) -> float:
    return each[0]


def run_ranks(address: str, run_id: str, ranks: range, world_size: int, pipe: Connection) -> None:
    """Be these ranks: say ``ready``, wait for (steps, begin, interval, spread), train, and say what was seen."""
    crowd = Crowd(address, run_id, ranks, world_size)
    settled = lambda: all(rank.is_settled for rank in crowd.ranks)  # noqa: E731
    crowd.listen_until(settled, _READY_SECONDS, "the worker does not welcome everybody")
    pipe.send({"joined_at": time.monotonic(), "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir())})
    while not pipe.poll(0.0):
        crowd.listen(0.02)
    num_steps, begin_at, interval_seconds, spread_seconds = pipe.recv()
    before, counts_before = time.process_time(), Counter(crowd.counts)
    crowd.train(num_steps, begin_at, interval_seconds, spread_seconds)
    cpu_seconds, counts = time.process_time() - before, crowd.counts - counts_before
    until = time.monotonic() + _LAST_ACKS_SECONDS
    while any(rank.num_unacked for rank in crowd.ranks) and time.monotonic() < until:
        crowd.listen(0.02)
    pipe.send(
        {
            "cpu_seconds": cpu_seconds,
            "counts": dict(counts),
            "messages": sum(rank.sequence for rank in crowd.ranks),
            "unacked": sum(rank.num_unacked for rank in crowd.ranks),
            "ack_lags": crowd.ack_lags.tobytes(),
            "late_by": crowd.late_by.tobytes(),
            "last_sent_at": crowd.last_sent_at,
        }
    )
    pipe.recv()
    crowd.end(num_steps)
    pipe.send({"counts": dict(crowd.counts)})
    crowd.close()
