"""Both ends of the wire on real sockets: trainers, and a worker with faults that a test switches on by name."""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from tests.support.publisher_trainer import Trainer

from sidestep.protocol import frames
from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import Ack, Blob, Hello, Kind, Message, NoAck, Refuse, Reject, Welcome
from sidestep.protocol.ranges import RangeSet


class RouterWorker:
    """Welcomes, stores and acks as docs/delivery.md says; ``stop`` forgets, like SIGKILL, what was not committed."""

    def __init__(self, address: str, committed: RangeSet | None = None) -> None:
        self.address = address
        self.instance = secrets.token_hex(4)
        self.committed = committed or RangeSet()
        self.stored: dict[int, Message] = {}
        self.arrivals: list[int] = []  # every sequenced message as it arrives, repeats included
        self.kinds: list[Kind] = []
        self.hellos: list[Hello] = []
        self.envelopes: list[Envelope] = []
        self.blobs: dict[str, bytes] = {}
        self.num_peers = 0
        # faults
        self.reading = True
        self.acking = True
        self.commit_at_most = 1 << 60
        self.wanted: tuple[str, ...] = ()
        self.refused: set[int] = set()
        self.reject_reason = ""
        self.no_ack_reason = ""
        self._say: deque[bytes] = deque()
        self._peers: dict[bytes, frames.ChunkJoiner] = {}
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.configure: Callable[[zmq.Socket[bytes]], None] = lambda _socket: None

    def start(self) -> RouterWorker:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10), "the socket is bound"
        return self

    def stop(self) -> None:
        self._stopping = True
        if self._thread is not None:
            self._thread.join(10)
            assert not self._thread.is_alive()

    def say(self, message: Message | bytes) -> None:
        """Send to everybody who is known."""
        identity = Envelope(run_id="", incarnation="", rank=0)
        self._say.append(message if isinstance(message, bytes) else frames.encode(identity, message))

    def _serve(self, ready: threading.Event) -> None:
        context = zmq.Context()
        with context, context.socket(zmq.ROUTER) as socket:
            socket.linger = 0
            socket.rcvhwm = 16
            self.configure(socket)
            deadline = time.monotonic() + 5
            while True:
                try:
                    socket.bind(self.address)
                    break
                except zmq.ZMQError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
            ready.set()
            while not self._stopping:
                while self._say:
                    frame = self._say.popleft()
                    for peer in tuple(self._peers):
                        socket.send_multipart([peer, frame])
                if self.reading and socket.poll(5):
                    self._take(socket)
                elif not self.reading:
                    time.sleep(0.005)

    def _answer(self, socket: zmq.Socket[bytes], peer: bytes, message: Message) -> None:
        envelope = Envelope(run_id="", incarnation="", rank=0)
        socket.send_multipart([peer, frames.encode(envelope, message)])

    def _take(self, socket: zmq.Socket[bytes]) -> None:
        peer, frame = socket.recv_multipart()
        if self.reject_reason:
            self._answer(socket, peer, Reject(reason=self.reject_reason))
            return
        if peer not in self._peers:
            self._peers[peer] = frames.ChunkJoiner()
            self.num_peers += 1
            welcome = Welcome(
                instance=self.instance,
                committed=self.committed.ranges(),
                hello_known=bool(self.hellos),
                wanted=tuple(digest for digest in self.wanted if digest not in self.blobs),
            )
            self._answer(socket, peer, welcome)
        whole: bytes | None = frame
        if frames.peek(frame).kind == Kind.CHUNK:
            _, whole = self._peers[peer].add(frame)
        if whole is not None:
            self._store(socket, peer, whole)

    def _store(self, socket: zmq.Socket[bytes], peer: bytes, frame: bytes) -> None:
        envelope, message = frames.decode(frame)
        assert isinstance(message, Message)
        self.kinds.append(message.kind)
        self.envelopes.append(envelope)
        if isinstance(message, Hello):
            self.hellos.append(message)
        elif isinstance(message, Blob):
            self.blobs[message.digest] = message.content
        if envelope.sequence == 0:
            return
        self.arrivals.append(envelope.sequence)
        if envelope.sequence in self.refused:
            self._answer(socket, peer, Refuse(sequence=envelope.sequence, reason="asked to by the test"))
        elif self.no_ack_reason:
            self._answer(socket, peer, NoAck(reason=self.no_ack_reason))
        elif envelope.sequence <= self.commit_at_most:
            self.committed.add(envelope.sequence)
            self.stored.setdefault(envelope.sequence, message)
            if self.acking:
                self._answer(socket, peer, Ack(committed=self.committed.ranges()))


@pytest.fixture
def address() -> Iterator[str]:
    """An ipc address in a private folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="sst-") as folder:
        yield f"ipc://{Path(folder) / 'w.sock'}"


@pytest.fixture
def make_worker(address: str) -> Iterator[Callable[..., RouterWorker]]:
    """Make workers at ``address``; all of them are stopped at the end."""
    made: list[RouterWorker] = []

    def make(committed: RangeSet | None = None) -> RouterWorker:
        made.append(RouterWorker(address, committed))
        return made[-1]

    yield make
    for worker in made:
        worker.stop()


@pytest.fixture
def make_trainer(address: str) -> Iterator[Callable[..., Trainer]]:
    """Make trainers that publish to ``address``; all of them are closed at the end."""
    made: list[Trainer] = []

    def make(**settings: Any) -> Trainer:
        made.append(Trainer(address, **settings))
        return made[-1]

    yield make
    for trainer in made:
        trainer.publisher.close(0.05)
        trainer.wait_for_the_end()


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], None]:
    """Wait, at most 20 s, until a condition holds."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.005)

    return wait
