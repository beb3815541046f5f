"""A trainer as the worker sees it: a real DEALER socket that says what a test tells it to, and nothing by itself."""

from __future__ import annotations

import os
import socket as sockets
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import zmq

from sidestep.protocol.frames import Envelope, UnknownMessage, decode, encode, split
from sidestep.protocol.messages import (
    Ack,
    Answers,
    Blob,
    Goodbye,
    Hello,
    LearningRates,
    Losses,
    Message,
    Role,
    StepEnd,
    Welcome,
)
from sidestep.protocol.tables import digest, encode_table

GROUPS = encode_table({"names": ["vision_encoder", "language_model"]})
TOKENIZER = encode_table(
    {
        "kind": "texts",
        "texts": {0: "<eos>", 1: "A", 2: "B", 3: "C"},
        "eos_id": 0,
        "pad_id": 0,
        "vocabulary_size": 4,
        "special_ids": [0],
        "image_token_id": None,
    }
)
TABLES = {"groups": digest(GROUPS), "tokenizer": digest(TOKENIZER)}
CONTENTS = {digest(GROUPS): GROUPS, digest(TOKENIZER): TOKENIZER}

Kindly = TypeVar("Kindly", bound=Message)


def make_hello(**changes: Any) -> Hello:
    """Return the Hello of a small trainer on this host."""
    values: dict[str, Any] = {
        "project": "trials",
        "name": "small",
        "topology": {"host": sockets.gethostname(), "pid": os.getpid()},
        "settings": {"lr_interval": 1, "loss_breakdown_interval": 1, "answer_length_interval": 1},
        "run_config": {"lr": 0.1},
        "tables": TABLES,
    }
    return Hello(**{**values, **changes})


def step_messages(step: int, *, rate: float | None = None) -> list[Message]:
    """Return all that a rank says of one step in which rates, losses and answers are due, its end included."""
    rng = np.random.default_rng(step)
    return [
        LearningRates(step=step, rates=np.array([0.1 / (step + 1) if rate is None else rate, 0.2], np.float64)),
        Losses(
            step=step,
            microstep=0,
            labelled=3,
            losses=rng.random(3).astype(np.float32),
            target_ids=np.array([1, 2, 0], np.int32),
            roles=np.array([Role.FIRST | Role.CONTENT, Role.LATER | Role.CONTENT, Role.LATER], np.uint8),
        ),
        Answers(
            step=step,
            epoch=0,
            lengths=np.array([2], np.int32),
            counts=np.array([1], np.int64),
            labelled=3,
            batches=1,
        ),
        StepEnd(
            step=step,
            unix_time=1_700_000_000.0 + step,
            sent={"learning_rates": 1, "losses": 1, "answers": 1},
            due=("lr", "loss", "data"),
        ),
    ]


class WireTrainer:
    """One rank's stream. Messages keep their sequence numbers and bytes, so that they can be sent again."""

    def __init__(self, address: str, *, run_id: str = "run-1", incarnation: str = "inc-1", rank: int = 0) -> None:
        self.address = address
        self.run_id, self.incarnation, self.rank = run_id, incarnation, rank
        self.sequence = 0
        self.sent: dict[int, list[bytes]] = {}
        self.heard: list[Message | UnknownMessage] = []
        self.acked: set[int] = set()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Open a connection of its own: the worker has not seen it before."""
        if self._socket is not None:
            self._socket.close(0)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.RECONNECT_IVL, 20)
        self._socket.connect(self.address)

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close(0)
        self._context.term()

    def envelope(self, sequence: int = 0) -> Envelope:
        return Envelope(run_id=self.run_id, incarnation=self.incarnation, rank=self.rank, sequence=sequence)

    def send_frames(self, frames: Sequence[bytes]) -> None:
        """Send raw frames, whatever they are."""
        assert self._socket is not None
        for frame in frames:
            self._socket.send(frame)

    def say(self, message: Message, *, chunk_bytes: int | None = None) -> None:
        """Send an unsequenced message."""
        frame = encode(self.envelope(), message)
        self.send_frames([frame] if chunk_bytes is None else split(self.envelope(), frame, chunk_bytes))

    def send(self, message: Message, *, chunk_bytes: int | None = None) -> int:
        """Send a message under the stream's next number, and return the number."""
        self.sequence += 1
        envelope = self.envelope(self.sequence)
        frame = encode(envelope, message)
        self.sent[self.sequence] = [frame] if chunk_bytes is None else split(envelope, frame, chunk_bytes)
        self.send_frames(self.sent[self.sequence])
        return self.sequence

    def send_step(self, step: int) -> list[int]:
        """Send all of a step; return the numbers."""
        return [self.send(message) for message in step_messages(step)]

    def resend_unacked(self) -> None:
        """Send again what no ack has covered, in order."""
        for sequence in sorted(set(self.sent) - self.acked):
            self.send_frames(self.sent[sequence])

    def receive(self, timeout_seconds: float = 30.0) -> Message | UnknownMessage | None:
        """Return the next message of the worker, None after the timeout."""
        assert self._socket is not None
        if not self._socket.poll(int(timeout_seconds * 1_000)):
            return None
        _, message = decode(self._socket.recv())
        if isinstance(message, (Ack, Welcome)):
            for first, last in message.committed.tolist():
                self.acked.update(range(first, last + 1))
        self.heard.append(message)
        return message

    def wait_for(self, kind: type[Kindly], timeout_seconds: float = 30.0) -> Kindly:
        """Return the next message of this kind; others are remembered in ``heard``."""
        deadline = time.monotonic() + timeout_seconds
        while (left := deadline - time.monotonic()) > 0:
            message = self.receive(left)
            if isinstance(message, kind):
                return message
        raise AssertionError(f"no {kind.__name__} within {timeout_seconds} s; heard {self.heard[-5:]}")

    def wait_for_acks(self, sequences: Sequence[int], timeout_seconds: float = 30.0) -> None:
        """Return when all of ``sequences`` are acked."""
        deadline = time.monotonic() + timeout_seconds
        while not self.acked.issuperset(sequences):
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"not acked: {sorted(set(sequences) - self.acked)}")
            self.receive(left)

    def greet(self, hello: Hello | None = None) -> Welcome:
        """Say Hello, wait for the Welcome and send the tables that it asks for."""
        self.say(hello or make_hello())
        welcome = self.wait_for(Welcome)
        self.give(welcome.wanted)
        return welcome

    def give(self, digests: Sequence[str]) -> None:
        """Send tables."""
        for wanted in digests:
            self.say(Blob(digest=wanted, content=CONTENTS[wanted]))

    def goodbye(self, newest_step: int = -1, exit_code: int = 0) -> int:
        """Say that the stream ends."""
        return self.send(Goodbye(newest_step=newest_step, exit_code=exit_code))
