"""What is done with each frame, without a socket: greeted, joined, decoded, journaled, acked or refused.

Messages are committed in groups; an ack follows the commit and never comes before it (docs/delivery.md, 5 and 7).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from sidestep.protocol.errors import DecodeError, IncompatibleWireError
from sidestep.protocol.frames import Envelope, UnknownMessage, decode, identify
from sidestep.protocol.messages import (
    UNSEQUENCED,
    Ack,
    Blob,
    Command,
    Heartbeat,
    Hello,
    Kind,
    Message,
    NoAck,
    Notice,
    Refuse,
    Reject,
    Welcome,
)
from sidestep.protocol.ranges import RangeSet
from sidestep.protocol.tables import digest as digest_of
from sidestep.worker.errors import JournalWriteError
from sidestep.worker.intake.admission import MAX_HOLES, MAX_STRANGER_BYTES, MESSAGE_OVERHEAD_BYTES, is_within, why_not
from sidestep.worker.intake.assembly import Journaled, step_of
from sidestep.worker.intake.decisions import Incarnation
from sidestep.worker.intake.feed import Feed, HelloArrived, Refused
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.peers import Peer, Peers, Wanted
from sidestep.worker.intake.segments import Row

Reply: TypeAlias = tuple[bytes, Envelope, Message]
"""Routing id, envelope, message."""

RETRY_SECONDS: Final = 1.0
"""Between two tries to write to a journal that could not be written."""
MAX_WAITING_BYTES: Final = 64 << 20
"""Memory of what is not committed at which nothing more is read from the socket."""
MAX_GROUPS: Final = 4
"""While more waits in the socket, a commit takes in as many messages, and as much time, as so many would."""
MAX_UNDELIVERED: Final = 256
"""Notices and commands that wait for a trainer to connect, per worker."""
MAX_REJECTED: Final = 1_024
"""Connections that are not talked to and are remembered, so that each is told once."""
_NOBODY: Final = Envelope(run_id="", incarnation="", rank=0)


_KIND_AT: Final = 3
_MAJOR_AT: Final = 4
_MINOR_AT: Final = 5
_CHUNK: Final = int(Kind.CHUNK)


_Waiting: TypeAlias = tuple[Envelope, Message | UnknownMessage, bytes, float]
"""A sequenced message before its commit, with its frame and the unix time that it came at."""


class Reception:
    """The receiver's state; one thread calls it, but for ``send``, ``statistics`` and ``last_heard``."""

    def __init__(
        self,
        journal: Journal,
        feed: Feed,
        *,
        instance: str,
        commit_interval_seconds: float,
        commit_messages: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Take frames for ``journal``; ``clock`` gives the unix time that arrivals are stamped with."""
        self._journal = journal
        self._feed = feed
        self._instance = instance
        self._commit_interval_seconds = commit_interval_seconds
        self._commit_messages = commit_messages
        self._most_seconds = MAX_GROUPS * commit_interval_seconds
        self._most_messages = MAX_GROUPS * commit_messages
        self._clock = clock
        self._peers = Peers()
        self._wanted = Wanted(journal.index.blob_digests())
        self._incarnations: dict[str, Incarnation] = {each.incarnation: each for each in journal.index.incarnations()}
        self._hellos: set[tuple[str, int]] = set()
        for incarnation in self._incarnations:
            for rank, body in journal.index.hellos(incarnation).items():
                self._remember_hello(incarnation, rank, body)
        self._taken: dict[tuple[str, int], RangeSet] = {}
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        self._waiting_streams: set[tuple[str, int]] = set()
        self._waiting_since: float | None = None
        self._to_ack: dict[bytes, Peer] = {}
        self._retry_at = 0.0
        self._outgoing: deque[tuple[str, Message]] = deque(maxlen=MAX_UNDELIVERED)
        self._rejected: set[bytes] = set()
        self._counts: Counter[str] = Counter()
        self._num_frames = 0
        self._now = 0.0
        self.last_heard: dict[str, float] = {}
        """Incarnation to when any of its ranks was last heard, on the clock that ``take`` is called with."""
        self._accounts: dict[tuple[str, int], Mapping[str, tuple[int, int, int]]] = {}
        self.failure = ""
        """Why the journal cannot be written at the moment; empty while it can."""

    def _remember_hello(self, incarnation: str, rank: int, body: bytes) -> None:
        _, hello = decode(body)
        self._hellos.add((incarnation, rank))
        if isinstance(hello, Hello):
            self._wanted.named(incarnation, rank, hello.tables.values())

    # ------------------------------------------------------------------------------------------------ frames

    @property
    def waits(self) -> bool:
        """Whether something waits for a commit or an ack."""
        return self._waiting_since is not None

    @property
    def is_full(self) -> bool:
        """Whether reading on would hold more than ``MAX_WAITING_BYTES`` that are not on disk."""
        return self._waiting_bytes >= MAX_WAITING_BYTES

    def take(self, routing_id: bytes, frame: bytes, now: float) -> list[Reply]:
        """Take one frame; return what is to be said at once. Nothing that a peer sends makes this raise."""
        self._num_frames += 1
        self._now = now
        replies: list[Reply] = []
        try:
            whole: bytes | None = frame
            if len(frame) > _KIND_AT and frame[_KIND_AT] == _CHUNK:
                whole = self._join(routing_id, frame, now, replies)
            if whole is not None:
                envelope, message = decode(whole)
                if isinstance(message, Hello):
                    self._take_hello(routing_id, whole, envelope, message, replies)
                else:
                    peer = self._greet(routing_id, envelope, now, replies)
                    self._take_message(peer, whole, envelope, message, replies)
        except IncompatibleWireError as error:
            self._reject(routing_id, str(error), replies)
        except DecodeError as error:
            self._refuse(routing_id, frame, str(error), now, replies)
        except JournalWriteError as error:
            self._peers.forget(routing_id)
            self._fail(error, now)
            replies.append((routing_id, _NOBODY, NoAck(reason=self.failure)))
        return replies

    def _join(self, routing_id: bytes, frame: bytes, now: float, replies: list[Reply]) -> bytes | None:
        peer = self._greet(routing_id, identify(frame), now, replies)
        _, whole = self._peers.join(peer, frame)
        if peer.incarnation not in self._incarnations and peer.joiner.held_bytes > MAX_STRANGER_BYTES:
            self._counts["strangers"] += 1
            self._peers.forget(routing_id)
        return whole

    def _greet(self, routing_id: bytes, envelope: Envelope, now: float, replies: list[Reply]) -> Peer:
        """Return the connection's peer; one that is not known gets a Welcome, and sends all again that we lack."""
        peer, is_new = self._peers.meet(routing_id, envelope, now)
        if peer.is_admitted or is_within(envelope, self._incarnations):
            peer.is_admitted = True
            self.last_heard[peer.incarnation] = now
            if envelope.accounts:
                self._accounts[peer.stream] = envelope.accounts
        if is_new:
            self._counts["welcomes"] += 1
            committed = self._journal.segments.committed(peer.incarnation, peer.rank)
            self._taken.pop((peer.incarnation, peer.rank), None)  # what broke on disk since may come again
            welcome = Welcome(
                instance=self._instance,
                committed=committed.ranges(),
                hello_known=(peer.incarnation, peer.rank) in self._hellos,
                wanted=self._wanted.ask(peer, now),
            )
            replies.append((routing_id, peer.envelope(), welcome))
        return peer

    def _take_message(
        self, peer: Peer, frame: bytes, envelope: Envelope, message: Message | UnknownMessage, replies: list[Reply]
    ) -> None:
        if envelope.sequence == 0 or frame[_KIND_AT] in UNSEQUENCED:
            if isinstance(message, Blob):
                self._take_blob(peer, message, self._now, replies)
            else:
                self._counts["heartbeats" if isinstance(message, Heartbeat) else "misplaced"] += 1
        elif peer.is_admitted:
            self._take_sequenced(peer, frame, envelope, message)
        elif envelope.incarnation not in self._incarnations:
            self._counts["strangers"] += 1  # its Welcome has said that its Hello is not known; it comes again after it
        else:
            raise DecodeError("no such rank or run in this incarnation")

    def _take_hello(
        self, routing_id: bytes, frame: bytes, envelope: Envelope, hello: Hello, replies: list[Reply]
    ) -> None:
        stream = (envelope.incarnation, envelope.rank)
        reason = why_not(envelope, hello, self._incarnations, len(self._hellos))
        if reason:
            self._reject(routing_id, reason, replies)
            return
        if stream not in self._hellos:
            made = Incarnation(
                incarnation=envelope.incarnation,
                run_id=envelope.run_id,
                attempt=-1,
                first_seen=self._clock(),
                world_size=max(1, hello.world_size),
                start_step=hello.start_step,
            )
            self._incarnations[made.incarnation] = self._journal.index.add_hello(
                made, envelope.rank, self._clock(), bytes(frame)
            )
            self._hellos.add(stream)
            self._wanted.named(*stream, hello.tables.values())
            self._feed.tell(HelloArrived(run_id=envelope.run_id, incarnation=envelope.incarnation))
        known_before = self._peers.get(routing_id) is not None
        peer = self._greet(routing_id, envelope, self._now, replies)
        if known_before:
            replies.append(self._ack(peer, self._now))

    def _take_blob(self, peer: Peer, blob: Blob, now: float, replies: list[Reply]) -> None:
        if not self._wanted.is_missing(blob.digest):
            self._counts["misplaced"] += 1  # nobody's table, or one that is here
            return
        if digest_of(blob.content) != blob.digest:
            self._counts["refused"] += 1
            return
        self._journal.index.add_blob(blob.digest, blob.content, self._clock())
        self._wanted.arrived(blob.digest)
        if peer.incarnation in self._incarnations:
            self._feed.tell(HelloArrived(run_id=peer.run_id, incarnation=peer.incarnation))
        replies.append(self._ack(peer, now))

    def _take_sequenced(self, peer: Peer, frame: bytes, envelope: Envelope, message: Message | UnknownMessage) -> None:
        sequence = envelope.sequence
        taken = self._taken.get(peer.stream)
        if taken is None:
            taken = self._taken[peer.stream] = self._known(peer.stream)
        is_torn = taken.num_ranges >= MAX_HOLES
        if is_torn and sequence - 1 not in taken and sequence + 1 not in taken:
            raise DecodeError(f"the stream's numbers have {MAX_HOLES} holes already")
        self._to_ack[peer.routing_id] = peer
        if self._waiting_since is None:
            self._waiting_since = self._now
        if not taken.add(sequence):
            self._counts["duplicates"] += 1
            return
        self._waiting.append((envelope, message, bytes(frame), self._clock()))
        self._waiting_bytes += len(frame) + MESSAGE_OVERHEAD_BYTES
        self._waiting_streams.add(peer.stream)

    def _known(self, stream: tuple[str, int]) -> RangeSet:
        """Return the numbers of a stream that are on disk or wait for it."""
        known = self._journal.segments.committed(*stream)
        for envelope, *_ in self._waiting if stream in self._waiting_streams else ():
            if (envelope.incarnation, envelope.rank) == stream:
                known.add(envelope.sequence)
        return known

    # ------------------------------------------------------------------------------------------------ what is wrong

    def _reject(self, routing_id: bytes, reason: str, replies: list[Reply]) -> None:
        self._counts["rejected"] += 1
        if len(self._rejected) > MAX_REJECTED:
            self._rejected.clear()
        if routing_id not in self._rejected:
            self._rejected.add(routing_id)
            replies.append((routing_id, _NOBODY, Reject(reason=reason)))

    def _refuse(self, routing_id: bytes, frame: bytes, reason: str, now: float, replies: list[Reply]) -> None:
        self._counts["refused"] += 1
        try:
            envelope = identify(frame)
        except (DecodeError, IncompatibleWireError):
            self._counts["unidentified"] += 1
            return
        peer = self._greet(routing_id, envelope, now, replies)
        if envelope.sequence and not self._journal.segments.holds(peer.incarnation, peer.rank, envelope.sequence):
            replies.append((routing_id, peer.envelope(), Refuse(sequence=envelope.sequence, reason=reason)))
            if is_within(envelope, self._incarnations):
                self._feed.tell(Refused(peer.run_id, peer.incarnation, peer.rank, envelope.sequence))

    # ------------------------------------------------------------------------------------------------ commits

    def commit_due(self, now: float) -> bool:
        """Return whether what waits should be committed now."""
        since = self._waiting_since
        if since is None or now < self._retry_at:
            return False
        return now - since >= self._commit_interval_seconds or len(self._waiting) >= self._commit_messages

    def pauses(self, now: float) -> bool:
        """Return whether a commit is due though the next frame is here already, or memory is full.

        A group then grows up to ``MAX_GROUPS`` times as large: the thread waits for the disk less often.
        """
        since = self._waiting_since
        if since is None:
            return False
        is_long = now - since >= self._most_seconds or len(self._waiting) >= self._most_messages
        return (is_long and now >= self._retry_at) or self._waiting_bytes >= MAX_WAITING_BYTES

    def commit(self, now: float) -> list[Reply]:
        """Write what waits in one transaction; return the acks, or where it failed NoAcks, and keep it."""
        waiting, peers = self._waiting, list(self._to_ack.values())
        try:
            rows = [_row(each, at) for at, each in enumerate(waiting, self._journal.segments.next_arrival)]
            self._journal.segments.append(rows)
        except JournalWriteError as error:
            self._fail(error, now)
            return [(peer.routing_id, peer.envelope(), NoAck(reason=self.failure)) for peer in peers]
        self.failure = ""
        self._counts["commits"] += 1
        self._counts["journaled"] += len(rows)
        self._waiting, self._waiting_bytes, self._waiting_since = [], 0, None
        self._waiting_streams.clear()
        self._to_ack.clear()
        self._feed.offer([_journaled(each, row) for each, row in zip(waiting, rows, strict=True)])
        return [self._ack(peer, now) for peer in peers]

    def _fail(self, error: JournalWriteError, now: float) -> None:
        self._counts["failed_commits"] += 1
        self._retry_at = now + RETRY_SECONDS
        self.failure = f"the journal cannot be written: {error}"

    def _ack(self, peer: Peer, now: float) -> Reply:
        committed = self._journal.segments.committed_ranges(peer.incarnation, peer.rank)
        return peer.routing_id, peer.envelope(), Ack(committed=committed, wanted=self._wanted.ask(peer, now))

    # ------------------------------------------------------------------------------------------------ the other way

    def send(self, run_id: str, message: Notice | Command) -> None:
        """Say something to a run's trainer: a notice to its lowest rank, a command to all. Any thread may call it."""
        self._outgoing.append((run_id, message))

    def outgoing(self) -> list[Reply]:
        """Return what is to be said now; what nobody is there to hear waits."""
        replies: list[Reply] = []
        for _ in range(len(self._outgoing)):
            run_id, message = self._outgoing.popleft()
            peers = self._peers.of_run(run_id)
            if not peers:
                self._outgoing.append((run_id, message))
            chosen = peers[:1] if isinstance(message, Notice) else peers
            replies += [(peer.routing_id, peer.envelope(), message) for peer in chosen]
        return replies

    def account(self, incarnation: str) -> tuple[int, int]:
        """Return how many messages an incarnation had made when it was last heard, and how many are on disk."""
        accounts = [each for (name, _), each in list(self._accounts.items()) if name == incarnation]
        made = sum(produced for each in accounts for produced, _, _ in each.values())
        segments = self._journal.segments
        held = sum(len(segments.committed(name, rank)) for name, rank in segments.streams() if name == incarnation)
        return made, held

    def gone(self, routing_id: bytes) -> None:
        """A connection cannot be reached any more."""
        self._counts["unreachable"] += 1
        self._peers.forget(routing_id)

    def statistics(self) -> Mapping[str, int]:
        """Return exact counts since the start, and how much waits."""
        return {
            "frames": self._num_frames,
            **dict(self._counts),
            "peers": len(self._peers),
            "waiting": len(self._waiting),
        }


def _row(each: _Waiting, arrival: int) -> Row:
    """Return a message as it is stored; its number over all messages follows those that are on disk."""
    (_, incarnation, rank, sequence, _, _), message, frame, received_at = each
    kind, major, minor = frame[_KIND_AT], frame[_MAJOR_AT], frame[_MINOR_AT]
    return Row(incarnation, rank, sequence, kind, step_of(message), major, minor, received_at, arrival, frame)


def _journaled(each: _Waiting, row: Row) -> tuple[Journaled, int]:
    """Return the same as the feed takes it, with the memory in bytes that it takes."""
    envelope, message, frame, received_at = each
    made = Journaled(envelope, message, row.arrival, received_at, row.wire_minor)
    return made, len(frame) + MESSAGE_OVERHEAD_BYTES
