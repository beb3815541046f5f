"""What is done with each frame, without a socket: greeted, joined, decoded, journaled, acked or refused.

Messages are committed in groups; an ack follows the commit and never comes before it (docs/delivery.md, 5 and 7).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, NamedTuple, TypeAlias

from sidestep.protocol.errors import DecodeError, IncompatibleWireError
from sidestep.protocol.frames import Envelope, UnknownMessage, decode, identify, peek
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
from sidestep.protocol.tables import digest as digest_of
from sidestep.worker.errors import JournalWriteError
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
"""Uncommitted bytes at which nothing more is read from the socket."""
MAX_UNDELIVERED: Final = 256
"""Notices and commands that wait for a trainer to connect, per worker."""


MAX_REJECTED: Final = 1_024
"""Connections of another wire version that are remembered, so that each is told once."""


class _Arrived(NamedTuple):
    routing_id: bytes
    frame: bytes
    now: float


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
        self._clock = clock
        self._peers = Peers()
        self._wanted = Wanted(journal.index.blob_digests())
        self._incarnations: dict[str, Incarnation] = {each.incarnation: each for each in journal.index.incarnations()}
        self._hellos: set[tuple[str, int]] = set()
        for incarnation in self._incarnations:
            for rank, body in journal.index.hellos(incarnation).items():
                self._remember_hello(incarnation, rank, body)
        self._waiting: dict[tuple[str, int, int], tuple[Row, Journaled]] = {}
        self._waiting_bytes = 0
        self._waiting_since: float | None = None
        self._to_ack: dict[bytes, Peer] = {}
        self._retry_at = 0.0
        self._outgoing: deque[tuple[str, Message]] = deque(maxlen=MAX_UNDELIVERED)
        self._rejected: set[bytes] = set()
        self._counts: Counter[str] = Counter()
        self.last_heard: dict[str, float] = {}
        """Incarnation to when any of its ranks was last heard, on the clock that ``take`` is called with."""
        self.produced: dict[tuple[str, int], int] = {}
        """(incarnation, rank) to the messages it had produced when it was last heard."""
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
        self._counts["frames"] += 1
        replies: list[Reply] = []
        try:
            whole: bytes | None = frame
            if peek(frame).kind == Kind.CHUNK:
                peer = self._greet(routing_id, identify(frame), now, replies)
                _, whole = peer.joiner.add(frame)
            if whole is not None:
                envelope, message = decode(whole)
                self._take_message(_Arrived(routing_id, whole, now), envelope, message, replies)
        except IncompatibleWireError as error:
            self._reject(routing_id, error, replies)
        except DecodeError as error:
            self._refuse(routing_id, frame, str(error), now, replies)
        except JournalWriteError as error:
            self._peers.forget(routing_id)
            self._fail(error, now)
            replies.append((routing_id, Envelope(run_id="", incarnation="", rank=0), NoAck(reason=self.failure)))
        return replies

    def _greet(self, routing_id: bytes, envelope: Envelope, now: float, replies: list[Reply]) -> Peer:
        """Return the connection's peer; one that is not known gets a Welcome, and sends all again that we lack."""
        peer, is_new = self._peers.meet(routing_id, envelope, now)
        self.last_heard[envelope.incarnation] = now
        if envelope.accounts:
            produced = sum(counts[0] for counts in envelope.accounts.values())
            self.produced[envelope.incarnation, envelope.rank] = produced
        if is_new:
            self._counts["welcomes"] += 1
            welcome = Welcome(
                instance=self._instance,
                committed=self._journal.segments.committed(peer.incarnation, peer.rank).ranges(),
                hello_known=(peer.incarnation, peer.rank) in self._hellos,
                wanted=self._wanted.ask(peer, now),
            )
            replies.append((routing_id, peer.envelope(), welcome))
        return peer

    def _take_message(
        self, arrived: _Arrived, envelope: Envelope, message: Message | UnknownMessage, replies: list[Reply]
    ) -> None:
        if isinstance(message, Hello):
            self._take_hello(arrived, envelope, message, replies)
            return
        peer = self._greet(arrived.routing_id, envelope, arrived.now, replies)
        if isinstance(message, Blob):
            self._take_blob(peer, message, arrived.now, replies)
        elif isinstance(message, Heartbeat):
            self._counts["heartbeats"] += 1
        elif envelope.sequence == 0 or (isinstance(message, Message) and message.kind in UNSEQUENCED):
            self._counts["misplaced"] += 1
        elif envelope.incarnation not in self._incarnations:
            self._counts["strangers"] += 1  # its Welcome has said that its Hello is not known; it comes again after it
        else:
            self._take_sequenced(peer, arrived, Journaled(envelope=envelope, message=message))

    def _take_hello(self, arrived: _Arrived, envelope: Envelope, hello: Hello, replies: list[Reply]) -> None:
        stream = (envelope.incarnation, envelope.rank)
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
                made, envelope.rank, self._clock(), bytes(arrived.frame)
            )
            self._hellos.add(stream)
            self._wanted.named(*stream, hello.tables.values())
            self._feed.tell(HelloArrived(run_id=envelope.run_id, incarnation=envelope.incarnation))
        known_before = self._peers.get(arrived.routing_id) is not None
        peer = self._greet(arrived.routing_id, envelope, arrived.now, replies)
        if known_before:
            replies.append(self._ack(peer, arrived.now))

    def _take_blob(self, peer: Peer, blob: Blob, now: float, replies: list[Reply]) -> None:
        if digest_of(blob.content) != blob.digest:
            self._counts["refused"] += 1
            return
        self._journal.index.add_blob(blob.digest, blob.content, self._clock())
        self._wanted.arrived(blob.digest)
        self._feed.tell(HelloArrived(run_id=peer.run_id, incarnation=peer.incarnation))
        replies.append(self._ack(peer, now))

    def _take_sequenced(self, peer: Peer, arrived: _Arrived, each: Journaled) -> None:
        rank, sequence = each.key
        self._to_ack[peer.routing_id] = peer
        key = (each.envelope.incarnation, rank, sequence)
        if self._waiting_since is None:
            self._waiting_since = arrived.now
        if key in self._waiting or self._journal.segments.holds(*key):
            self._counts["duplicates"] += 1
            return
        prefix, body = peek(arrived.frame), bytes(arrived.frame)
        step = step_of(each.message)
        row = Row(*key, prefix.kind, step, prefix.major, prefix.minor, self._clock(), -1, body)
        self._waiting[key] = (row, each)
        self._waiting_bytes += len(body)

    # ------------------------------------------------------------------------------------------------ what is wrong

    def _reject(self, routing_id: bytes, error: IncompatibleWireError, replies: list[Reply]) -> None:
        self._counts["rejected"] += 1
        if len(self._rejected) > MAX_REJECTED:
            self._rejected.clear()
        if routing_id not in self._rejected:
            self._rejected.add(routing_id)
            replies.append((routing_id, Envelope(run_id="", incarnation="", rank=0), Reject(reason=str(error))))

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
            self._feed.tell(
                Refused(run_id=peer.run_id, incarnation=peer.incarnation, rank=peer.rank, sequence=envelope.sequence)
            )

    # ------------------------------------------------------------------------------------------------ commits

    def commit_due(self, now: float) -> bool:
        """Return whether what waits should be committed now."""
        if self._waiting_since is None or now < self._retry_at:
            return False
        return len(self._waiting) >= self._commit_messages or now - self._waiting_since >= self._commit_interval_seconds

    def commit(self, now: float) -> list[Reply]:
        """Write what waits in one transaction; return the acks, or where it failed NoAcks, and keep it."""
        first = self._journal.segments.next_arrival
        rows: list[Row] = []
        messages: list[tuple[Journaled, int]] = []
        for at, (row, each) in enumerate(self._waiting.values(), first):
            rows.append(row._replace(arrival=at))
            messages.append((replace(each, arrival=at, received_at=row.received_at), len(row.body)))
        peers = list(self._to_ack.values())
        try:
            self._journal.segments.append(rows)
        except JournalWriteError as error:
            self._fail(error, now)
            return [(peer.routing_id, peer.envelope(), NoAck(reason=self.failure)) for peer in peers]
        self.failure = ""
        self._counts["commits"] += 1
        self._counts["journaled"] += len(rows)
        self._waiting.clear()
        self._waiting_bytes, self._waiting_since = 0, None
        self._to_ack.clear()
        self._feed.offer(messages)
        return [self._ack(peer, now) for peer in peers]

    def _fail(self, error: JournalWriteError, now: float) -> None:
        self._counts["failed_commits"] += 1
        self._retry_at = now + RETRY_SECONDS
        self.failure = f"the journal cannot be written: {error}"

    def _ack(self, peer: Peer, now: float) -> Reply:
        committed = self._journal.segments.committed(peer.incarnation, peer.rank).ranges()
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
        made = sum(count for (name, _), count in list(self.produced.items()) if name == incarnation)
        segments = self._journal.segments
        held = sum(len(segments.committed(name, rank)) for name, rank in segments.streams() if name == incarnation)
        return made, held

    def gone(self, routing_id: bytes) -> None:
        """A connection cannot be reached any more."""
        self._counts["unreachable"] += 1
        self._peers.forget(routing_id)

    def statistics(self) -> Mapping[str, int]:
        """Return exact counts since the start, and how much waits."""
        return {**dict(self._counts), "peers": len(self._peers), "waiting": len(self._waiting)}
