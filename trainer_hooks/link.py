"""The link between a publisher and its worker: when it is made, how much it carries a tick, when it is made anew."""

from __future__ import annotations

from sidestep.protocol.limits import MAX_PUBLISHER_TICK_BYTES, MAX_PUBLISHER_TICK_MESSAGES
from sidestep.trainer_hooks.connection import Connection, Connector
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.conversation import Conversation
from sidestep.trainer_hooks.courtesy import give_way
from sidestep.trainer_hooks.refusals import Handshake, why_refused

_MAX_RECEIVED_PER_TICK = 64
_BACKOFF_SECONDS = (1.0, 30.0)
_MAX_FAILURES_COUNTED = 10
_MOST_DROPPED = 5
"""Handshakes in a row that the other side may break off before it counts as a refusal, or as what is wrong."""


class Link:
    """One connection at a time, and what passes over it; lives on the publisher's thread.

    Whatever breaks it, a new one begins with Hello, and nothing else leaves before its Welcome.
    """

    def __init__(
        self,
        connector: Connector,
        conversation: Conversation,
        *,
        address: str,
        console: Console,
        has_keys: bool = False,
    ) -> None:
        """Begin without a connection."""
        self._connector = connector
        self._conversation = conversation
        self._address = address
        self._console = console
        self._has_keys = has_keys
        self._connection: Connection | None = None
        self._reopen_at = 0.0
        self._num_refusals_in_a_row = 0
        self._num_handshakes = 0
        self._num_dropped = 0
        self._hangs_up = False
        self.is_blocked = False
        """Whether the socket had no room at the last tick."""
        self.num_frames_sent = 0
        self.num_bytes_sent = 0
        self.num_connections = 0
        self.num_handshake_failures = 0

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, welcomed or not."""
        return self._connection is not None

    def tick(self, now: float, *, is_rounds_turn: bool) -> None:
        """Take what came, send this tick's share, and where it is the turn look after the connection."""
        if self._conversation.rejected:
            self.disconnect()
        elif self._connection is None and now >= self._reopen_at:
            self._connect(now)
        if self._connection is not None:
            self._receive(self._connection, now)
            self._send(self._connection, now)
            if is_rounds_turn:
                self._watch(self._connection, now)

    def disconnect(self) -> None:
        """Close the connection, if there is one; the next tick makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self.is_blocked = False

    def close(self) -> None:
        """Close everything."""
        self.disconnect()
        self._connector.close()

    def _connect(self, now: float) -> None:
        self._reopen_at = now + _BACKOFF_SECONDS[1]  # if the next line raises, there is no point in trying each tick
        self._connection = self._connector.connect()
        self.num_connections += 1
        self._num_handshakes = self._num_dropped = 0
        self._conversation.opened(now)

    def _receive(self, connection: Connection, now: float) -> None:
        for _ in range(_MAX_RECEIVED_PER_TICK):
            give_way()
            frame = connection.receive()
            if frame is None:
                return
            self._num_refusals_in_a_row = 0
            self._hangs_up = False
            self._conversation.received(frame, now)

    def _send(self, connection: Connection, now: float) -> None:
        num_bytes = 0
        self.is_blocked = False
        for _ in range(MAX_PUBLISHER_TICK_MESSAGES):
            give_way()
            frame = self._conversation.next_frame(now)
            if frame is None or (num_bytes and num_bytes + len(frame) > MAX_PUBLISHER_TICK_BYTES):
                return
            if not connection.send(frame):
                self.is_blocked = True
                return
            self._conversation.frame_sent()
            num_bytes += len(frame)
            self.num_frames_sent += 1
            self.num_bytes_sent += len(frame)

    def _watch(self, connection: Connection, now: float) -> None:
        """Replace a connection that will never work again, or has been silent for too long."""
        for outcome in connection.handshakes():
            if outcome is Handshake.DONE:
                self._num_dropped = 0
                self._hangs_up = False
                self._num_handshakes += 1
                if self._num_handshakes > 1:
                    self._conversation.reconnected(now)
                continue
            self._num_dropped += 1
            self._hangs_up = self._hangs_up or self._num_dropped >= _MOST_DROPPED
            # Without keys nothing is proved by a peer that hangs up: a worker that goes away does so too.
            is_in_vain = self._has_keys and self._num_dropped >= _MOST_DROPPED
            if outcome is not Handshake.DROPPED or is_in_vain:
                self._refused(outcome, now)
                return
        if self._conversation.wants_new_connection(now):
            self._reopen_at = now
            self.disconnect()
        if self._hangs_up and self._conversation.is_alone(now):
            # Of two that part over keys, the one that has heard the other out hangs up. It may always be the worker.
            self._console.once("handshake", why_refused(Handshake.DROPPED, self._address, has_keys=self._has_keys))
        elif not self._num_refusals_in_a_row:  # else the console has been told what is wrong, and what to do
            self._conversation.warn_if_alone(now, self._address)

    def _refused(self, outcome: Handshake, now: float) -> None:
        """Let go of a socket that never tries again, or in vain, and try with another one, ever less often."""
        self.num_handshake_failures += 1
        low, high = _BACKOFF_SECONDS
        self._reopen_at = now + min(high, low * 2.0**self._num_refusals_in_a_row)
        self._num_refusals_in_a_row = min(self._num_refusals_in_a_row + 1, _MAX_FAILURES_COUNTED)
        self._console.once("handshake", why_refused(outcome, self._address, has_keys=self._has_keys))
        self.disconnect()
