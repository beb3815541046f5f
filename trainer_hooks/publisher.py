"""The publisher: a daemon thread with a slow tick, which carries what the hooks hand over to a worker.

The hook appends to a deque and returns: no lock, no wake, no system call (docs/delivery.md, section 5: waking the
thread cost 0.11-0.22 ms a call, a 20 ms tick without wake 0.026 ms). Whatever goes wrong here is counted, said once,
and never reaches the trainer.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import zmq
from zmq.utils.monitor import recv_monitor_message

from sidestep.protocol.endpoints import Endpoint
from sidestep.protocol.frames import Envelope
from sidestep.protocol.limits import (
    MAX_FRAME_BYTES,
    MAX_PUBLISHER_TICK_BYTES,
    MAX_PUBLISHER_TICK_MESSAGES,
    PUBLISHER_IDLE_TICK_SECONDS,
    PUBLISHER_TICK_SECONDS,
    RECEIVE_HIGH_WATER_MARK_MESSAGES,
    SEND_HIGH_WATER_MARK_MESSAGES,
    WINDOW_BYTES,
)
from sidestep.protocol.messages import Command, Goodbye, Hello, Kind, Message, StepEnd
from sidestep.trainer_hooks.accounts import KindAccount
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.conversation import Conversation, Patience
from sidestep.trainer_hooks.delivery import Delivery
from sidestep.trainer_hooks.publisher_statistics import PublisherStatistics
from sidestep.trainer_hooks.source import Source

_MAX_SUBMISSIONS = 65_536
"""Messages between two ticks; more than that means that the thread does not run, and they are dropped and counted."""
_MAX_COMMANDS = 16
_MAX_RECEIVED_PER_TICK = 64
_ROUNDS_SECONDS = 0.2
"""How often the monitor is looked at, and an idle publisher's figures are renewed."""
_CLOSING_TICK_SECONDS = 0.002
_SILENCE_SECONDS = 10.0
"""Nothing acked for so long: close() does not wait its full time."""
_SHORT_CLOSE_SECONDS = 0.5
_JOIN_MARGIN_SECONDS = 0.25
_BACKOFF_SECONDS = (1.0, 30.0)
_FATAL_EVENTS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
"""After one of these the socket never tries again, even when the worker is set right (libzmq 4.3.5)."""


def _is_readable(socket: zmq.Socket[bytes]) -> bool:
    """Ask without a system call, and without the exception that an empty ``recv`` costs."""
    return bool(cast("int", socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


class _Connection:
    """A DEALER socket and its monitor; made, used and closed by one thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: Endpoint) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = SEND_HIGH_WATER_MARK_MESSAGES
        self._socket.rcvhwm = RECEIVE_HIGH_WATER_MARK_MESSAGES * 4
        self._socket.maxmsgsize = MAX_FRAME_BYTES
        self._socket.reconnect_ivl = 100
        self._socket.reconnect_ivl_max = 1_000
        if endpoint.transport == "tcp":
            self._socket.ipv6 = ":" in endpoint.host
            self._socket.connect_timeout = 2_000
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | _FATAL_EVENTS)
        try:
            self._socket.connect(endpoint.address)
        except zmq.ZMQError:
            self.close()
            raise

    def receive(self) -> bytes | None:
        """Return one frame, or None; never waits."""
        if not _is_readable(self._socket):
            return None
        parts = self._socket.recv_multipart(zmq.NOBLOCK)
        return parts[-1]

    def send(self, frame: bytes) -> bool:
        """Send one frame; False where there is no room for it now."""
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def events(self) -> list[int]:
        """Return what the monitor saw since the last call."""
        seen: list[int] = []
        while _is_readable(self._monitor):
            seen.append(int(recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]))
        return seen

    def close(self) -> None:
        """Close both sockets at once; what was not carried is forgotten."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)


class Publisher:
    """Ships messages to the worker at ``endpoint``; every call returns at once, ``close`` within its time.

    ``submit``, ``take_command`` and ``close`` belong to the training thread, everything else to the thread that
    ``start`` makes. A forked child owns neither: there all calls do nothing.
    """

    def __init__(
        self,
        endpoint: str,
        identity: Envelope,
        hello: Hello,
        *,
        blobs: Mapping[str, bytes] | None = None,
        source: Source | None = None,
        console: Console | None = None,
        window_bytes: int = WINDOW_BYTES,
        patience: Patience | None = None,
    ) -> None:
        """Make a publisher that does nothing until ``start``.

        Args:
            endpoint: Where the worker listens; ``ipc://PATH`` or ``tcp://HOST:PORT``.
            identity: Run, incarnation and rank of all messages.
            hello: Sent first on every connection.
            blobs: Digest to the bytes of a table, sent when a worker asks for it.
            source: Staging, whose finished messages are carried too.
            console: Where notices are shown; stderr by default.
            window_bytes: Bytes of unsent and unacked messages together.
            patience: How long what is waited for.

        Raises:
            EndpointError: ``endpoint`` is malformed, or names any free port.
            EncodeError: ``hello`` cannot travel.
            ValueError: ``window_bytes`` is not positive.
        """
        self._endpoint = Endpoint.parse(endpoint)
        self._console = console or Console()
        self._source = source
        self._delivery = Delivery(identity, window_bytes=window_bytes, complain=self._console.once)
        self._commands: deque[Command] = deque(maxlen=_MAX_COMMANDS)
        self._started_at = time.monotonic()
        self._conversation = Conversation(
            self._delivery,
            hello,
            blobs or {},
            console=self._console,
            on_command=self._commands.append,
            now=self._started_at,
            patience=patience,
        )
        self._submissions: deque[Message] = deque()
        self._too_late: Counter[Kind] = Counter()  # written by the training thread alone
        self._accepting = True
        self._closing = False
        self._wakes_to_close = threading.Event()
        self._next_rounds = 0.0
        self._deadline = 0.0
        self._connection: _Connection | None = None
        self._reopen_at = 0.0
        self._num_failures_in_a_row = 0
        self._statistics = PublisherStatistics()
        self._accounts: dict[Kind, KindAccount] = {}
        self._num_ticks = self._num_frames_sent = self._num_bytes_sent = self._num_connections = self._num_taken = 0
        self._num_handshakes = self._num_handshake_failures = self._num_errors = 0
        self._thread: threading.Thread | None = None
        _living.add(self)

    # ------------------------------------------------------------------------------------- the training thread

    def start(self) -> Publisher:
        """Start the thread; return the publisher itself."""
        self._thread = threading.Thread(target=self._run, name="sidestep-publisher", daemon=True)
        self._thread.start()
        return self

    def submit(self, message: Message) -> None:
        """Hand ``message`` over, arrays included; O(1), and nothing is raised whatever became of the worker."""
        if self._accepting and len(self._submissions) < _MAX_SUBMISSIONS:
            self._submissions.append(message)
        else:
            self._too_late[message.kind] += 1

    def take_command(self) -> Command | None:
        """Return the oldest command that nobody took, or None."""
        return self._commands.popleft() if self._commands else None

    def accounts(self) -> dict[Kind, KindAccount]:
        """Return the account per kind as of the last tick; ``produced`` is always the sum of the other four."""
        accounts = dict(self._accounts)
        nothing = KindAccount(produced=0, accepted=0, refused=0, dropped=0, in_window=0)
        for kind, count in list(self._too_late.items()):
            account = accounts.get(kind, nothing)
            accounts[kind] = replace(account, produced=account.produced + count, dropped=account.dropped + count)
        return accounts

    def statistics(self) -> PublisherStatistics:
        """Return what was done as of the last tick."""
        return self._statistics

    def close(self, timeout_seconds: float = 5.0, *, exit_code: int = 0, reason: str = "") -> None:
        """Say goodbye and wait for the acks, at most ``timeout_seconds``; what is left is dropped, counted and said.

        Half a second at most where nothing was acked for 10 s (docs/delivery.md, section 10). Idempotent.
        """
        if not self._accepting:
            return
        self._accepting = False
        if self._thread is None:  # it was never started
            self._settle_the_rest()
            return
        last_answer = self._conversation.last_answer_at or self._started_at
        now = time.monotonic()
        allowed = timeout_seconds if now - last_answer < _SILENCE_SECONDS else _SHORT_CLOSE_SECONDS
        self._deadline = now + min(allowed, timeout_seconds)
        self._drain_source(now + min(allowed, timeout_seconds) / 2)
        newest = max((m.step for m in tuple(self._submissions) if isinstance(m, StepEnd)), default=-1)
        newest = max(newest, self._conversation.newest_step)
        self._submissions.append(Goodbye(newest_step=newest, exit_code=exit_code, reason=reason))
        self._closing = True
        self._wakes_to_close.set()
        self._thread.join(max(0.0, self._deadline - time.monotonic()) + _JOIN_MARGIN_SECONDS)

    def _drain_source(self, until: float) -> None:
        """Give staged copies the chance to become messages before the goodbye."""
        while self._source is not None and time.monotonic() < until:
            self._source.advance()
            if self._source.num_pending == 0:
                return
            time.sleep(_CLOSING_TICK_SECONDS)

    def disown(self) -> None:
        """Become inert in a forked child, which has neither the thread nor a right to the socket."""
        self._accepting = False
        self._thread = None
        self._submissions = deque()
        self._commands.clear()

    # ------------------------------------------------------------------------------------- the publisher thread

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        try:
            while not self._is_done():
                try:
                    self._tick(context, time.monotonic())
                except Exception as error:  # noqa: BLE001  (nothing may end this thread; it is counted and said)
                    self._num_errors += 1
                    self._console.once("error", f"the publisher met an error and goes on: {error!r}")
                self._pause()
        finally:
            self._disconnect()
            context.term()
            self._settle_the_rest()

    def _pause(self) -> None:
        """Wait for the next tick: a short one while something is left to send, else a long one.

        In a thread that wakes among a training step's cold caches a tick costs a tenth of a millisecond and more, most
        of it outside our code: ticks that find nothing are what this saves (docs/overhead.md).
        """
        if self._closing:
            time.sleep(_CLOSING_TICK_SECONDS)
            return
        has_more = self._conversation.is_welcome and self._delivery.num_unsent > 0
        self._wakes_to_close.wait(PUBLISHER_TICK_SECONDS if has_more else PUBLISHER_IDLE_TICK_SECONDS)

    def _is_done(self) -> bool:
        if not self._closing:
            return False
        if time.monotonic() >= self._deadline or self._conversation.rejected:
            return True
        delivery = self._delivery
        return not self._submissions and delivery.num_unsent == 0 and delivery.num_unacked == 0

    def _settle_the_rest(self) -> None:
        self._take_in()
        num_lost = self._delivery.abandon()
        self._publish_figures()
        if num_lost and not self._conversation.rejected:
            self._console.line(
                f"sidestep: {num_lost} messages had not reached the worker at {self._endpoint.address} when the "
                "trainer ended; they are lost."
            )

    def _tick(self, context: zmq.Context[zmq.Socket[bytes]], now: float) -> None:
        self._num_ticks += 1
        is_idle = not self._take_in() and self._delivery.num_unacked == 0
        is_rounds_turn = now >= self._next_rounds
        if is_rounds_turn:
            self._next_rounds = now + _ROUNDS_SECONDS
        if self._conversation.rejected:
            self._disconnect()
            self._delivery.abandon()
        elif self._connection is None and now >= self._reopen_at:
            self._connect(context, now)
        if self._connection is not None:
            self._receive(self._connection, now)
            self._send(self._connection, now)
            if is_rounds_turn:
                self._watch(self._connection, now)
        if not is_idle or is_rounds_turn:
            self._publish_figures()

    def _take_in(self) -> bool:
        """Take what the hooks and staging have; return whether there was anything."""
        num_before = self._num_taken
        while self._submissions:
            message = self._submissions.popleft()
            if isinstance(message, StepEnd):
                self._conversation.newest_step = max(self._conversation.newest_step, message.step)
            self._take(message)
        if self._source is not None:
            for message in self._source.poll():
                self._take(message)
            for skip in self._source.take_skips():
                self._num_taken += 1
                self._delivery.skip(skip.kind, skip.step, announced=skip.announced)
        return self._num_taken > num_before

    def _take(self, message: Message) -> None:
        self._num_taken += 1
        self._delivery.take(message)

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]], now: float) -> None:
        self._reopen_at = now + _BACKOFF_SECONDS[1]  # if the next line raises, there is no point in trying each tick
        self._connection = _Connection(context, self._endpoint)
        self._num_connections += 1
        self._num_handshakes = 0
        self._conversation.opened(now)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _receive(self, connection: _Connection, now: float) -> None:
        for _ in range(_MAX_RECEIVED_PER_TICK):
            frame = connection.receive()
            if frame is None:
                return
            self._num_failures_in_a_row = 0
            self._conversation.received(frame, now)

    def _send(self, connection: _Connection, now: float) -> None:
        num_bytes = 0
        for _ in range(MAX_PUBLISHER_TICK_MESSAGES):
            frame = self._conversation.next_frame(now)
            if frame is None or (num_bytes and num_bytes + len(frame) > MAX_PUBLISHER_TICK_BYTES):
                return
            if not connection.send(frame):
                return
            self._conversation.frame_sent()
            num_bytes += len(frame)
            self._num_frames_sent += 1
            self._num_bytes_sent += len(frame)

    def _watch(self, connection: _Connection, now: float) -> None:
        """Replace a connection that will never work again, or has been silent for too long."""
        for event in connection.events():
            if event & _FATAL_EVENTS:
                self._num_handshake_failures += 1
                low, high = _BACKOFF_SECONDS
                self._reopen_at = now + min(high, low * 2.0**self._num_failures_in_a_row)
                self._num_failures_in_a_row = min(self._num_failures_in_a_row + 1, 10)
                self._console.once(
                    "handshake",
                    f"what answers at {self._endpoint.address} refuses the handshake (is it a worker, with these "
                    "keys?). Training goes on; it is tried again from time to time.",
                )
                self._disconnect()
                return
            self._num_handshakes += 1
            if self._num_handshakes > 1:
                self._conversation.reconnected(now)
        if self._conversation.wants_new_connection(now):
            self._reopen_at = now
            self._disconnect()
        self._conversation.warn_if_alone(now, self._endpoint.address)

    def _publish_figures(self) -> None:
        delivery, conversation = self._delivery, self._conversation
        self._accounts = delivery.accounts()
        self._statistics = PublisherStatistics(
            num_ticks=self._num_ticks,
            num_frames_sent=self._num_frames_sent,
            num_bytes_sent=self._num_bytes_sent,
            num_resends=delivery.num_resends,
            num_connections=self._num_connections,
            num_welcomes=conversation.num_welcomes,
            num_handshake_failures=self._num_handshake_failures,
            num_undecodable=conversation.num_undecodable,
            num_encode_errors=delivery.num_encode_errors,
            num_errors=self._num_errors,
            num_unsent=delivery.num_unsent,
            num_unacked=delivery.num_unacked,
            window_bytes=delivery.size_bytes,
            rejected=conversation.rejected,
        )


_living: weakref.WeakSet[Publisher] = weakref.WeakSet()


def _disown_all() -> None:
    for publisher in tuple(_living):
        publisher.disown()


os.register_at_fork(after_in_child=_disown_all)
