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

from sidestep.protocol.endpoints import Endpoint
from sidestep.protocol.faults import Faults
from sidestep.protocol.frames import Envelope
from sidestep.protocol.keys import ClientKeys, checked_folder
from sidestep.protocol.limits import WINDOW_BYTES
from sidestep.protocol.messages import Command, Goodbye, Hello, Kind, Message, StepEnd
from sidestep.trainer_hooks.accounts import KindAccount
from sidestep.trainer_hooks.connection import Connector, DealerConnector
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.conversation import Conversation, Patience
from sidestep.trainer_hooks.courtesy import give_way, make_courteous
from sidestep.trainer_hooks.delivery import Delivery
from sidestep.trainer_hooks.faults import POINTS, FaultyConnector, FaultyIntake
from sidestep.trainer_hooks.link import Link
from sidestep.trainer_hooks.pace import Pace
from sidestep.trainer_hooks.publisher_statistics import PublisherStatistics
from sidestep.trainer_hooks.source import Source

_MAX_SUBMISSIONS = 65_536
"""Messages between two ticks; more than that means that the thread does not run, and they are dropped and counted."""
_MAX_COMMANDS = 16
_ROUNDS_SECONDS = 0.2
"""How often the connection is looked after, and an idle publisher's figures are renewed."""
_CLOSING_TICK_SECONDS = 0.002
_SILENCE_SECONDS = 10.0
"""No answer for so long to what waits for one: close() does not wait its full time."""
_SHORT_CLOSE_SECONDS = 0.5
_JOIN_MARGIN_SECONDS = 0.25


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
        faults: Faults | None = None,
        keys: ClientKeys | None = None,
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
            faults: What goes wrong on purpose (tests); else what ``SIDESTEP_FAULTS`` says, which is nothing.
            keys: What the worker knows this trainer by; needed where other hosts can reach the endpoint.

        Raises:
            EndpointError: ``endpoint`` is malformed, or can be reached from other hosts and there are no ``keys``.
            EncodeError: ``hello`` cannot travel.
            ValueError: ``window_bytes`` is not positive, or the faults name a point that there is not.
        """
        self._endpoint = Endpoint.parse(endpoint)
        if keys is None:
            checked_folder(self._endpoint, None)
        self._console = console or Console()
        self._source = source
        self._delivery = Delivery(identity, window_bytes=window_bytes, complain=self._console.once)
        self._commands: deque[Command] = deque(maxlen=_MAX_COMMANDS)
        self._conversation = Conversation(
            self._delivery,
            hello,
            blobs or {},
            console=self._console,
            on_command=self._commands.append,
            now=time.monotonic(),
            patience=patience,
        )
        self._submissions: deque[Message] = deque()
        self._too_late: Counter[Kind] = Counter()  # written by the training thread alone
        self._accepting = True
        self._closing = False
        self._wakes_to_close = threading.Event()
        self._next_rounds = 0.0
        self._deadline = 0.0
        connector: Connector = DealerConnector(self._endpoint, keys)
        self._faulty: FaultyIntake | None = None
        faults = Faults.from_environment() if faults is None else faults
        if faults is not None:
            faults.check_points("trainer", POINTS)
            self._faulty = FaultyIntake(faults, self._delivery, rank=identity.rank)
            connector = FaultyConnector(
                connector, faults, rank=identity.rank, newest_step=lambda: self._conversation.newest_step
            )
        self._link = Link(
            connector,
            self._conversation,
            address=self._endpoint.address,
            console=self._console,
            has_keys=keys is not None,
        )
        self._pace = Pace()
        self._statistics = PublisherStatistics()
        self._accounts: dict[Kind, KindAccount] = {}
        self._num_ticks = self._num_taken = self._num_errors = 0
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

        Half a second at most where what was sent has gone unanswered for 10 s (docs/delivery.md, section 10).
        Idempotent.
        """
        if not self._accepting:
            return
        self._accepting = False
        if self._thread is None:  # it was never started
            self._settle_the_rest()
            return
        now = time.monotonic()
        silent_seconds = self._conversation.silent_seconds(now)
        allowed = timeout_seconds if silent_seconds < _SILENCE_SECONDS else _SHORT_CLOSE_SECONDS
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
        courtesy = make_courteous()
        try:
            while not self._is_done():
                courtesy.new_tick()
                try:
                    self._tick(time.monotonic())
                except Exception as error:  # noqa: BLE001  (nothing may end this thread; it is counted and said)
                    self._num_errors += 1
                    self._console.once("error", f"the publisher met an error and goes on: {error!r}")
                self._pause()
        finally:
            self._link.close()
            self._settle_the_rest()

    def _pause(self) -> None:
        """Wait for the next tick, or for ``close``."""
        if self._closing:
            time.sleep(_CLOSING_TICK_SECONDS)
            return
        has_more = self._link.is_open and self._conversation.has_more(time.monotonic())
        self._wakes_to_close.wait(self._pace.pause_seconds(has_more=has_more, blocked=self._link.is_blocked))

    def _is_done(self) -> bool:
        if not self._closing:
            return False
        if time.monotonic() >= self._deadline or self._conversation.rejected:
            return True
        delivery = self._delivery
        return not self._submissions and delivery.num_unsent == 0 and delivery.num_unacked == 0

    def _settle_the_rest(self) -> None:
        self._take_in(time.monotonic())
        if self._faulty is not None:
            self._faulty.release()
        num_lost = self._delivery.abandon()
        self._publish_figures()
        if num_lost and not self._conversation.rejected:
            self._console.line(
                f"sidestep: {num_lost} messages had not reached the worker at {self._endpoint.address} when the "
                "trainer ended; they are lost."
            )

    def _tick(self, now: float) -> None:
        self._num_ticks += 1
        if self._faulty is not None:
            self._faulty.at_tick(self._conversation.newest_step)
        is_idle = not self._take_in(now) and self._delivery.num_unacked == 0
        is_rounds_turn = now >= self._next_rounds
        if is_rounds_turn:
            self._next_rounds = now + _ROUNDS_SECONDS
        self._link.tick(now, is_rounds_turn=is_rounds_turn)
        if self._conversation.rejected:
            self._delivery.abandon()
        if not is_idle or is_rounds_turn:
            self._publish_figures()

    def _take_in(self, now: float) -> bool:
        """Take what the hooks and staging have; return whether there was anything."""
        num_before, num_steps = self._num_taken, 0
        while self._submissions:
            give_way()
            message = self._submissions.popleft()
            if isinstance(message, StepEnd):
                num_steps += 1
                self._conversation.newest_step = max(self._conversation.newest_step, message.step)
            self._take(message)
        if num_steps:
            self._pace.steps_ended(num_steps, now)
        if self._source is not None:
            for message in self._source.poll():
                give_way()
                self._take(message)
            for skip in self._source.take_skips():
                self._num_taken += 1
                self._delivery.skip(skip.kind, skip.step, announced=skip.announced)
        return self._num_taken > num_before

    def _take(self, message: Message) -> None:
        self._num_taken += 1
        if self._faulty is None:
            self._delivery.take(message)
        else:
            self._faulty.take(message)

    def _publish_figures(self) -> None:
        delivery, conversation, link = self._delivery, self._conversation, self._link
        self._accounts = delivery.accounts()
        self._statistics = PublisherStatistics(
            num_ticks=self._num_ticks,
            num_frames_sent=link.num_frames_sent,
            num_bytes_sent=link.num_bytes_sent,
            num_resends=delivery.num_resends,
            num_connections=link.num_connections,
            num_welcomes=conversation.num_welcomes,
            num_handshake_failures=link.num_handshake_failures,
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
