"""The worker's socket: one thread that reads frames, lets ``Reception`` judge them, and says what it answers."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

import zmq

from sidestep.protocol.endpoints import Endpoint
from sidestep.protocol.errors import EncodeError
from sidestep.protocol.frames import encode, split
from sidestep.protocol.keys import ServerKeys
from sidestep.protocol.limits import (
    MAX_FRAME_BYTES,
    RECEIVE_HIGH_WATER_MARK_MESSAGES,
    TCP_KEEPALIVE_IDLE_SECONDS,
    TCP_KEEPALIVE_INTERVAL_SECONDS,
    TCP_KEEPALIVE_PROBES,
)
from sidestep.worker.errors import ListenError
from sidestep.worker.intake.authentication import Authentication
from sidestep.worker.intake.listening import close_to_others
from sidestep.worker.intake.reception import Reception, Reply

_LOG: Final = logging.getLogger(__name__)
_IDLE_POLL_MILLISECONDS: Final = 50
_BUSY_POLL_MILLISECONDS: Final = 5
_FRAMES_PER_TURN: Final = 256
_QUIET_SECONDS: Final = 0.3
_NOBLOCK: Final = int(zmq.NOBLOCK)
_BACKLOG_CONNECTIONS: Final = 4_096
"""Ranks that connect at once; ZeroMQ's own 100 makes the others try again. The system may allow fewer (somaxconn)."""
_KEEPALIVE: Final = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: TCP_KEEPALIVE_IDLE_SECONDS,
    zmq.TCP_KEEPALIVE_INTVL: TCP_KEEPALIVE_INTERVAL_SECONDS,
    zmq.TCP_KEEPALIVE_CNT: TCP_KEEPALIVE_PROBES,
}
"""Of a host that lost its power the kernel lets go after two minutes; a cut of some seconds goes unnoticed."""


class Receiver:
    """Owns the ROUTER socket; the socket is made, used and closed by its thread alone."""

    def __init__(self, endpoint: Endpoint, reception: Reception, *, keys: ServerKeys | None = None) -> None:
        """Prepare to listen at ``endpoint``, with ``keys`` to those alone who prove that they have one of theirs."""
        self._endpoint = endpoint
        self._keys = keys
        self._door: Authentication | None = None
        self._reception = reception
        self._thread = threading.Thread(target=self._run, name="sidestep-receiver", daemon=True)
        self._stop = threading.Event()
        self._bound = threading.Event()
        self._drain_until = 0.0
        self._error: Exception | None = None
        self._counts: Counter[str] = Counter()
        self.address = endpoint.address
        """Where it listens; with the real port once it has been started."""
        self.last_turn = 0.0
        """When the thread last went round, on the monotonic clock."""

    @property
    def is_alive(self) -> bool:
        """Whether the thread is at work."""
        return self._thread.is_alive() and self._error is None

    def start(self, timeout_seconds: float = 10.0) -> None:
        """Listen.

        Raises:
            ListenError: the address cannot be bound.
        """
        self._thread.start()
        if not self._bound.wait(timeout_seconds) or self._error is not None:
            raise ListenError(f"{self._endpoint.address} cannot be listened on: {self._error or 'timed out'}")

    def stop(self, drain_seconds: float = 2.0) -> None:
        """Take what is still on its way (until it has been quiet a moment), commit it, ack it, close the socket."""
        self._drain_until = time.monotonic() + drain_seconds
        self._stop.set()
        self._thread.join(drain_seconds + 15.0)
        if self._thread.is_alive():
            _LOG.error("the receiver does not end")

    def statistics(self) -> Mapping[str, int]:
        """Return exact counts since the start."""
        door = self._door
        return {**self._reception.statistics(), **self._counts, **({} if door is None else door.statistics())}

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        try:
            socket.set(zmq.LINGER, 200)
            socket.set(zmq.RCVHWM, RECEIVE_HIGH_WATER_MARK_MESSAGES)
            socket.set(zmq.BACKLOG, _BACKLOG_CONNECTIONS)
            socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
            socket.set(zmq.ROUTER_MANDATORY, 1)
            if self._endpoint.transport == "tcp":
                socket.set(zmq.IPV6, int(":" in self._endpoint.host))
                for option, value in _KEEPALIVE.items():
                    socket.set(option, value)
            if self._keys is not None:
                self._door = Authentication(context, socket, self._keys)
            socket.bind(self._endpoint.address)
            if self._endpoint.path is not None:
                close_to_others(self._endpoint.path)
            self.address = socket.get_string(zmq.LAST_ENDPOINT)
            self._bound.set()
            self._serve(socket)
        except Exception as error:  # noqa: BLE001  (the thread must not end unseen: health says so, and the service stops)
            self._error = error
            _LOG.exception("the receiver has stopped")
        finally:
            self._bound.set()
            if self._door is not None:
                self._door.close()
            socket.close()
            context.term()

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        quiet_since = time.monotonic()
        has_more = False
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        if self._door is not None:
            self._door.watch(poller)
        while True:
            now = self.last_turn = time.monotonic()
            if self._door is not None:
                self._door.attend()
            if self._reception.is_full:
                time.sleep(_IDLE_POLL_MILLISECONDS / 1_000)
                has_more = False
            elif has_more or self._has_come(socket, poller):
                quiet_since = now
                has_more = self._read(socket)
            now = time.monotonic()
            if self._reception.pauses(now) if has_more else self._reception.commit_due(now):
                self._say(socket, self._reception.commit(now))
            self._say(socket, self._reception.outgoing())
            if self._stop.is_set() and (now - quiet_since > _QUIET_SECONDS or now > self._drain_until):
                self._say(socket, self._reception.commit(now))
                return

    def _has_come(self, socket: zmq.Socket[bytes], poller: zmq.Poller) -> bool:
        """Wait a moment for a frame, or for somebody at the door; return whether there is a frame."""
        patience = _BUSY_POLL_MILLISECONDS if self._reception.waits else _IDLE_POLL_MILLISECONDS
        if self._door is None:
            return bool(socket.poll(patience, zmq.POLLIN))
        return any(each is socket for each, _ in poller.poll(patience))

    def _read(self, socket: zmq.Socket[bytes]) -> bool:
        """Read for a turn; return whether more may be there."""
        receive, clock = socket.recv, time.monotonic
        take, pauses = self._reception.take, self._reception.pauses
        for _ in range(_FRAMES_PER_TURN):
            try:
                routing_id = receive(_NOBLOCK)
            except zmq.Again:
                return False
            frame = receive(0, copy=False)  # a message to a router is never its routing id alone
            if frame.more:  # asking the socket costs as much as reading four frames
                self._counts["malformed"] += 1
                while receive(0, copy=False).more:
                    continue
                continue
            now = clock()
            replies = take(routing_id, frame.bytes, now)
            if replies:
                self._say(socket, replies)
            if pauses(now):
                break
        return True

    def _say(self, socket: zmq.Socket[bytes], replies: Iterable[Reply]) -> None:
        for routing_id, envelope, message in replies:
            try:
                for frame in split(envelope, encode(envelope, message)):
                    socket.send_multipart([routing_id, frame], zmq.NOBLOCK)
            except zmq.Again:
                self._counts["unsent"] += 1  # the peer reads slowly; the next ack says all of this again
            except EncodeError:
                self._counts["unsent"] += 1
                _LOG.exception("an answer cannot be encoded")
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self._reception.gone(routing_id)
