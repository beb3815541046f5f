"""Who is connected, and which of them is asked for a table that nobody has sent yet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from sidestep.protocol.frames import ChunkJoiner, Envelope

MAX_PEERS: Final = 16_384
"""Connections that are remembered; the one that was silent longest is forgotten first, and greeted again."""
MAX_JOINING_BYTES: Final = 512 << 20
"""Messages in chunks that are not whole yet, over all connections; the connection with the most gives up first."""
ASK_AGAIN_SECONDS: Final = 10.0
"""A table that one rank was asked for in vain is asked of the next after it."""


@dataclass(slots=True)
class Peer:
    """One connection."""

    routing_id: bytes
    run_id: str
    incarnation: str
    rank: int
    last_seen: float
    is_admitted: bool = False
    """Whether the journal knows its incarnation, and the rank is one of it."""
    joiner: ChunkJoiner = field(default_factory=ChunkJoiner)
    identity: tuple[str, str, int] = field(init=False)
    """Run, incarnation, rank."""
    stream: tuple[str, int] = field(init=False)
    """Incarnation, rank."""

    def __post_init__(self) -> None:
        """Keep what every message is compared with."""
        self.identity = (self.run_id, self.incarnation, self.rank)
        self.stream = (self.incarnation, self.rank)

    def envelope(self) -> Envelope:
        """Return the envelope of what is said to it."""
        return Envelope(run_id=self.run_id, incarnation=self.incarnation, rank=self.rank)


class Peers:
    """All connections that have said who they are."""

    def __init__(self, max_peers: int = MAX_PEERS, max_joining_bytes: int = MAX_JOINING_BYTES) -> None:
        """Start with none."""
        self._peers: OrderedDict[bytes, Peer] = OrderedDict()
        self._max_peers = max_peers
        self._max_joining_bytes = max_joining_bytes
        self.joining_bytes = 0
        """What all joiners hold together."""

    def __len__(self) -> int:
        """Return how many are remembered."""
        return len(self._peers)

    def get(self, routing_id: bytes) -> Peer | None:
        """Return the connection's peer, None where it is not known."""
        return self._peers.get(routing_id)

    def meet(self, routing_id: bytes, envelope: Envelope, now: float) -> tuple[Peer, bool]:
        """Return the connection's peer and whether it is new; the same connection may not change its identity."""
        peer = self._peers.get(routing_id)
        if peer is not None and peer.identity == envelope[:3]:
            peer.last_seen = now
            self._peers.move_to_end(routing_id)
            return peer, False
        self.forget(routing_id)
        peer = self._peers[routing_id] = Peer(routing_id, envelope.run_id, envelope.incarnation, envelope.rank, now)
        if len(self._peers) > self._max_peers:
            self.forget(next(iter(self._peers)))
        return peer, True

    def join(self, peer: Peer, frame: bytes) -> tuple[Envelope, bytes | None]:
        """Give one chunk to the peer's joiner, within the bytes that all may hold; raises as ``ChunkJoiner.add``."""
        before = peer.joiner.held_bytes
        try:
            return peer.joiner.add(frame)
        finally:
            self.joining_bytes += peer.joiner.held_bytes - before
            while self.joining_bytes > self._max_joining_bytes:
                greedy = max(self._peers.values(), key=lambda each: each.joiner.held_bytes).joiner
                held = greedy.held_bytes
                greedy.give_up_oldest()
                self.joining_bytes += greedy.held_bytes - held

    def forget(self, routing_id: bytes) -> None:
        """Drop a connection that is gone."""
        peer = self._peers.pop(routing_id, None)
        if peer is not None:
            self.joining_bytes -= peer.joiner.held_bytes

    def of_run(self, run_id: str) -> list[Peer]:
        """Return the run's connections, the lowest rank first; of one rank only the one heard last."""
        newest: dict[tuple[str, int], Peer] = {}
        for peer in self._peers.values():  # heard last comes last
            if peer.run_id == run_id:
                newest[peer.incarnation, peer.rank] = peer
        return sorted(newest.values(), key=lambda peer: (peer.rank, -peer.last_seen))


class Wanted:
    """Tables that a Hello named and that nobody has sent: each is asked of one rank at a time."""

    def __init__(self, present: Iterable[str]) -> None:
        """Start with the digests that are ``present``."""
        self._present = set(present)
        self._asked: dict[str, tuple[bytes, float]] = {}
        self._known: dict[tuple[str, int], frozenset[str]] = {}
        self._named: set[str] = set()

    def named(self, incarnation: str, rank: int, digests: Iterable[str]) -> None:
        """Remember which tables this rank can send."""
        self._known[incarnation, rank] = frozenset(digests)
        self._named |= self._known[incarnation, rank]

    def is_missing(self, digest: str) -> bool:
        """Return whether a Hello named this table and nobody has sent it."""
        return digest in self._named and digest not in self._present

    def arrived(self, digest: str) -> None:
        """A table is here."""
        self._present.add(digest)
        self._asked.pop(digest, None)

    def ask(self, peer: Peer, now: float) -> tuple[str, ...]:
        """Return what this peer is asked for now: what it can send, nobody has, and no other is busy sending."""
        wanted = []
        for digest in sorted(self._known.get((peer.incarnation, peer.rank), frozenset()) - self._present):
            asked, since = self._asked.get(digest, (peer.routing_id, now))
            if asked != peer.routing_id and now - since < ASK_AGAIN_SECONDS:
                continue
            self._asked[digest] = (peer.routing_id, since if asked == peer.routing_id else now)
            wanted.append(digest)
        return tuple(wanted)
