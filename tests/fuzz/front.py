"""What is fuzzed: the decoder, the joiner of chunks, and the receiver's front with a real journal behind it.

Whatever comes, only the declared errors may leave the decoder and none may leave ``Reception.take``; every answer can
be encoded; and a trainer that speaks properly is still served, now and by the next worker on that journal.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Final

from tests.fuzz.mutations import IN_CHUNKS

from sidestep.protocol.errors import ProtocolError
from sidestep.protocol.frames import ChunkJoiner, Envelope, decode, encode, identify, split
from sidestep.protocol.messages import Ack, Hello, Kind, Notice
from sidestep.protocol.ranges import RangeSet
from sidestep.protocol.tables import decode_table
from sidestep.worker.intake.feed import Feed
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.reception import Reception

WIRE: Final = Path(__file__).parents[1] / "golden" / "wire"
HANG_SECONDS: Final = 1.0
"""CPU of one frame: what a busy machine adds does not count, and libFuzzer's own watch sees a standstill."""
_GOOD_PEER: Final = b"good"
_COMMIT_FRAMES: Final = 200
_SOME: Final = 4
"""One length of frames in so many is also tried as a chunk, and another as a table."""
_KEPT_MESSAGES: Final = 2_000
_FRONT_COUNTS: Final = ("journaled", "duplicates", "refused", "rejected", "strangers", "misplaced", "welcomes")


def seeds() -> list[bytes]:
    """Return the golden frames of every version, and two of them in chunks."""
    frames = [path.read_bytes() for path in sorted(WIRE.glob("*.frame"))]
    for name in ("1.1-hello", "1.1-losses"):
        whole = (WIRE / f"{name}.frame").read_bytes()
        frames += split(identify(whole), whole, 200)
    return frames


def chunked(given: bytes) -> list[bytes]:
    """Return the chunks of the frame behind ``IN_CHUNKS``, in order or not, one of them twice or left out."""
    chosen, frame = given[len(IN_CHUNKS)], given[len(IN_CHUNKS) + 1 :]
    try:
        envelope = identify(frame)
    except ProtocolError:
        envelope = identify((WIRE / "1.1-losses.frame").read_bytes())
    chunks = split(envelope, frame, max(64, len(frame) // (1 + chosen % 5)))
    if chosen & 32:
        chunks.reverse()
    if chosen & 64:
        chunks.append(chunks[0])
    return chunks[1:] if chosen & 128 else chunks


class Front:
    """Takes frame after frame; what must not happen raises AssertionError, or whatever came out."""

    def __init__(self) -> None:
        """Open a journal of its own, and greet as the golden frames' trainer and as a good one."""
        self.counts: Counter[str] = Counter()
        self.slowest_seconds = 0.0
        self._folder = Path(tempfile.mkdtemp(prefix="ss-fuzz-"))
        self._number = 0
        self._now = 0.0
        self._joiner = ChunkJoiner(max_bytes=1 << 20)
        self._open()

    def _open(self) -> None:
        self._journal = Journal(self._folder / "journal")
        self._feed = Feed(self._journal.segments, limit_bytes=0, start_arrival=self._journal.segments.next_arrival)
        self._reception = Reception(
            self._journal,
            self._feed,
            instance="fuzzed",
            commit_interval_seconds=1e9,
            commit_messages=_KEPT_MESSAGES,
        )
        for frame in ((WIRE / "1.1-hello.frame").read_bytes(), self._good(Hello())):
            self._reception.take(_GOOD_PEER, frame, self._now)

    def _good(self, message: Hello | Notice, sequence: int = 0) -> bytes:
        return encode(Envelope(run_id="good", incarnation="good-1", rank=0, sequence=sequence), message)

    def take(self, given: bytes) -> None:
        """Let everything have a frame, or the chunks that ``given`` is to be cut into."""
        for frame in chunked(given) if given.startswith(IN_CHUNKS) and len(given) > len(IN_CHUNKS) else [given]:
            self._take_one(frame)

    def _take_one(self, frame: bytes) -> None:
        began = time.thread_time()
        self.counts["frames"] += 1
        self._decode(frame)
        self._receive(frame)
        if self.counts["frames"] % _COMMIT_FRAMES == 0:
            self.serve_the_good_one()
        seconds = time.thread_time() - began
        self.slowest_seconds = max(self.slowest_seconds, seconds)
        if seconds > HANG_SECONDS:
            self.counts["hangs"] += 1

    def _decode(self, frame: bytes) -> None:
        try:
            decode(frame)
            self.counts["decoded"] += 1
        except ProtocolError as error:
            self.counts[type(error).__name__] += 1
        if frame[3:4] == bytes([Kind.CHUNK]) or len(frame) % _SOME == 0:
            self._join(frame)
        if len(frame) % _SOME == 1:
            try:
                decode_table(frame[16:])
                self.counts["tables"] += 1
            except ProtocolError:
                self.counts["no_tables"] += 1

    def _join(self, frame: bytes) -> None:
        try:
            _, whole = self._joiner.add(frame)
            self.counts["joined"] += whole is not None
        except ProtocolError as error:
            self.counts["joiner_" + type(error).__name__] += 1
        assert self._joiner.held_bytes <= (1 << 20) + (64 << 20), "the joiner holds more than one message too many"

    def _receive(self, frame: bytes) -> None:
        self._now += 0.001
        peer = b"p%d" % (len(frame) % 7)
        for routing_id, envelope, message in self._reception.take(peer, frame, self._now):
            assert routing_id == peer, "an answer for somebody else"
            split(envelope, encode(envelope, message))
            self.counts["answers"] += 1

    def serve_the_good_one(self) -> None:
        """Let the good trainer say something, and see that it is on disk and acked."""
        self._number += 1
        self._reception.take(_GOOD_PEER, self._good(Notice(text="well"), self._number), self._now)
        acks = [
            message
            for _, envelope, message in self._reception.commit(self._now)
            if envelope.run_id == "good" and isinstance(message, Ack)
        ]
        assert acks, "the good trainer is not acked"
        held = RangeSet.from_ranges(acks[0].committed)
        assert self._number in held, "the good trainer's message is not on disk"
        self._feed.take_events()

    def reopen(self, *, afresh: bool = False) -> None:
        """Close, and open what another worker would find; ``afresh``: in an empty folder."""
        self._reception.commit(self._now)
        self._sum_up()
        self._journal.close()
        if afresh:
            shutil.rmtree(self._folder / "journal")
            self._number = 0
        self._open()

    def _sum_up(self) -> None:
        counted = self._reception.statistics()
        self.counts.update({f"front_{name}": counted.get(name, 0) for name in _FRONT_COUNTS})

    def close(self) -> None:
        """Count what the front counted, and remove everything."""
        self._sum_up()
        self._journal.close()
        shutil.rmtree(self._folder)
