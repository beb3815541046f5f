"""A transport that writes the very frames that a worker would get, and the reader of what it wrote.

A recording is one file of all ranks: length and frame, one after another, compressed. What belongs to a run besides its
steps (introduction, tables) stands in it too, so that a worker's own code can judge it later.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final, cast

from sidestep.protocol.frames import Envelope, UnknownMessage, decode, encode
from sidestep.protocol.messages import UNSEQUENCED, Blob, Command, Goodbye, Hello, Message
from sidestep.trainer_hooks.staging import Staging
from sidestep.trainer_hooks.transport import OpenTransport

_LENGTH: Final = struct.Struct("<I")
FRAMES_FILE: Final = "frames.gz"


class Recording:
    """The file of a run, open for writing."""

    def __init__(self, path: Path, *, num_ranks: int) -> None:
        """Begin a file; what stood there is replaced."""
        self._file = cast("IO[bytes]", gzip.open(path, "wb", compresslevel=1))  # noqa: SIM115  (open as long as the run)
        self._num_ranks = num_ranks
        self._first: Envelope | None = None
        self.transports: list[RecordingTransport] = []

    def open_rank(self, rank: int) -> OpenTransport:
        """Return what `sidestep.attach(transport=...)` of a rank takes.

        Replicas of one process know nothing of each other: here they become ranks of one run, as a launcher's would be.
        """

        def opened(identity: Envelope, hello: Hello, blobs: Mapping[str, bytes], source: Staging) -> RecordingTransport:
            self._first = self._first or identity
            mine = self._first._replace(rank=rank)
            topology = {**hello.topology, "data_parallel_rank": rank, "data_parallel_size": self._num_ranks}
            if self._num_ranks > 1:
                topology["wrapper"] = "ddp"
            hello = replace(hello, world_size=self._num_ranks, topology=topology)
            transport = RecordingTransport(self, mine, source)
            transport.write(hello)
            for digest, content in blobs.items():
                transport.write(Blob(digest=digest, content=content))
            self.transports.append(transport)
            return transport

        return opened

    def write(self, frame: bytes) -> None:
        """Append a frame."""
        self._file.write(_LENGTH.pack(len(frame)))
        self._file.write(frame)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


class RecordingTransport:
    """One rank's way into the file: what is submitted waits until `drain`, which is not the trainer's time."""

    def __init__(self, recording: Recording, identity: Envelope, source: Staging) -> None:
        self._recording = recording
        self._identity = identity
        self._source = source
        self._sequence = 0
        self._waiting: list[Message] = []

    def submit(self, message: Message) -> None:
        """Keep a message until `drain`; one that ends a step is written after what the step has staged."""
        self._waiting.append(message)

    def take_command(self) -> Command | None:
        """Nobody asks for anything: a recording is judged afterwards."""
        return None

    def drain(self) -> None:
        """Write what is ready, in the place of the product's publisher thread."""
        self._source.advance()
        for message in (*self._source.poll(), *self._waiting):
            self.write(message)
        self._waiting.clear()

    def write(self, message: Message) -> None:
        """Write one message with the next sequence number."""
        if message.kind not in UNSEQUENCED:
            self._sequence += 1
        sequence = 0 if message.kind in UNSEQUENCED else self._sequence
        self._recording.write(encode(self._identity._replace(sequence=sequence), message))

    def close(self, timeout_seconds: float = 5.0, *, exit_code: int = 0, reason: str = "") -> None:
        """Write the goodbye."""
        del timeout_seconds
        self.drain()
        self.write(Goodbye(exit_code=exit_code, reason=reason))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One frame read back."""

    envelope: Envelope
    message: Message
    frame: bytes


def read_frames(path: Path) -> Iterator[bytes]:
    """Yield the frames of a file in their order.

    Raises:
        OSError: the file is not there, or was cut off.
    """
    with gzip.open(path, "rb") as file:
        while head := file.read(_LENGTH.size):
            yield file.read(_LENGTH.unpack(head)[0])


def read_messages(path: Path) -> Iterator[Recorded]:
    """Yield the messages of a file in their order; raises as `read_frames` does."""
    for frame in read_frames(path):
        envelope, message = decode(frame)
        if not isinstance(message, UnknownMessage):
            yield Recorded(envelope=envelope, message=message, frame=frame)
