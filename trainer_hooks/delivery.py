"""Which message leaves next, which is given up, and what became of each: lanes, window, ledger and accounts as one.

No socket, no clock, no thread: bytes out, ranges in. The publisher thread alone calls it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol import frames
from sidestep.protocol.errors import ProtocolError
from sidestep.protocol.frames import Envelope
from sidestep.protocol.limits import MAX_PUBLISHER_TICK_MESSAGES, WINDOW_BYTES
from sidestep.protocol.messages import STEP_KINDS, UNSEQUENCED, Kind, Message, StepEnd
from sidestep.trainer_hooks.accounts import Accounts, KindAccount
from sidestep.trainer_hooks.compaction import compacted
from sidestep.trainer_hooks.courtesy import in_pieces
from sidestep.trainer_hooks.lanes import Lanes, Unsent
from sidestep.trainer_hooks.step_ledger import StepLedger
from sidestep.trainer_hooks.window import Parcel, Window

_STEP_KINDS = frozenset(STEP_KINDS)


def _step_of(message: Message) -> int:
    step: int = message.step  # type: ignore[attr-defined]  # every kind in STEP_KINDS has one
    return step


class Delivery:
    """The messages of one stream (incarnation, rank) between the hook that made them and the ack.

    ``lanes + window <= window_bytes`` at every instant, but for ``StepEnd`` and ``Goodbye``: they are given up only
    where they and what is pinned fill ``WINDOW_BYTES`` (some 100,000 steps without a worker).
    """

    def __init__(
        self,
        identity: Envelope,
        *,
        window_bytes: int = WINDOW_BYTES,
        complain: Callable[[str, str], object] = lambda _code, _text: None,
    ) -> None:
        """Number from 1; ``complain(code, text)`` hears of messages that break the protocol's own rules.

        Raises:
            ValueError: ``window_bytes`` is not positive.
        """
        if window_bytes <= 0:
            raise ValueError(f"window_bytes is {window_bytes}; it must be positive")
        self._identity = identity
        self._window_bytes = window_bytes
        self._complain = complain
        self._lanes = Lanes()
        self._window = Window()
        self._ledger = StepLedger()
        self._accounts = Accounts()
        self._sequence = 0
        self.num_encode_errors = 0
        """Messages dropped because they break their own schema or a limit."""

    # ------------------------------------------------------------------------------------------------- in

    def take(self, message: Message) -> None:
        """Own ``message`` from now on; make room for it by giving up what is cheaper."""
        if message.kind in UNSEQUENCED:
            self.num_encode_errors += 1
            self._complain("unsequenced", f"a {message.kind.name} was submitted like a measurement; it was left out")
            return
        self._accounts.produce(message.kind)
        unsent = self._lanes.wrap(message)
        if isinstance(message, StepEnd):
            self._ledger.end_queued(message.step)
        elif message.kind in _STEP_KINDS:
            self._ledger.part_queued(_step_of(message))
        if unsent.rank and unsent.size_bytes > self._room(unsent.rank):
            self._give_up(unsent)
            return
        if len(self._lanes) >= MAX_PUBLISHER_TICK_MESSAGES:  # it is going to wait
            unsent.message = compacted(message)
        self._lanes.add(unsent)
        self._make_room()

    def skip(self, kind: Kind, step: int, *, announced: bool) -> None:
        """Count a message that never came to be; ``announced`` where the step's ``StepEnd`` counts it as sent."""
        self._accounts.produce(kind)
        self._accounts.drop(kind)
        if announced:
            self._correct(self._ledger.part_dropped(step, kind, was_queued=False))

    # ------------------------------------------------------------------------------------------------- out

    def next_frame(self) -> bytes | None:
        """Return the frame to send next, None when there is none; encodes and pins a message when it gets its turn."""
        frame = self._window.next_frame()
        while frame is None:
            unsent = self._lanes.pop_next()
            if unsent is None:
                return None
            self._pin(unsent)
            frame = self._window.next_frame()
        return frame

    def frame_sent(self) -> None:
        """Go on after the frame that ``next_frame`` returned."""
        self._window.frame_sent()

    def resend(self) -> None:
        """Send all that is unacked again, in order."""
        self._window.resend()

    # ------------------------------------------------------------------------------------------------- answers

    def acknowledge(self, committed: NDArray[np.int64]) -> int:
        """Count what the inclusive ranges [n, 2] hold as accepted; return how many messages that settles.

        Raises:
            ValueError: not ranges.
        """
        settled = self._window.acknowledge(committed)
        for parcel in in_pieces(settled):
            self._accounts.accept(parcel.kind)
        return len(settled)

    def refuse(self, sequence: int) -> bool:
        """Count the message ``sequence`` as refused; return whether it was waited for.

        Its step's ``StepEnd`` is sent again with one part fewer, so that the worker does not wait for it.
        """
        parcel = self._window.refuse(sequence)
        if parcel is None:
            return False
        self._accounts.refuse(parcel.kind)
        if parcel.step >= 0:
            self._correct(self._ledger.part_refused(parcel.step, parcel.kind))
        return True

    def abandon(self) -> int:
        """Give up everything, sent or not; return how many messages that were."""
        parcels = self._window.clear()
        for parcel in parcels:
            self._accounts.drop(parcel.kind)
        num_given_up = len(parcels)
        while (unsent := self._lanes.pop_next()) is not None:
            self._accounts.drop(unsent.message.kind)
            num_given_up += 1
        return num_given_up

    # ------------------------------------------------------------------------------------------------- figures

    @property
    def size_bytes(self) -> int:
        """Bytes held: unacked frames, and estimates of what is unsent."""
        return self._lanes.size_bytes + self._window.size_bytes

    @property
    def num_unsent(self) -> int:
        """Messages that wait for their first send."""
        return len(self._lanes)

    @property
    def num_to_send(self) -> int:
        """Messages that this connection has yet to carry: unsent ones, and those to be sent again."""
        return len(self._lanes) + self._window.num_outgoing

    @property
    def num_unacked(self) -> int:
        """Messages that were sent and are not acked."""
        return len(self._window)

    @property
    def num_resends(self) -> int:
        """Messages queued again after a Welcome."""
        return self._window.num_resends

    @property
    def num_dropped(self) -> int:
        """Messages given up so far."""
        return self._accounts.num_dropped

    def accounts(self) -> dict[Kind, KindAccount]:
        """Return the account per kind."""
        return self._accounts.snapshot(self._lanes.counts + self._window.counts)

    def envelope(self, sequence: int = 0) -> Envelope:
        """Return the envelope of a message that leaves now."""
        identity = self._identity
        return Envelope(
            run_id=identity.run_id,
            incarnation=identity.incarnation,
            rank=identity.rank,
            sequence=sequence,
            accounts=self._accounts.head(),
            resent=self._window.num_resends,
        )

    # ------------------------------------------------------------------------------------------------- inside

    def _room(self, rank: int) -> int:
        return self._window_bytes - self._window.size_bytes - self._lanes.dearer_bytes(rank)

    def _make_room(self) -> None:
        while self.size_bytes > self._window_bytes:
            cheapest = self._lanes.pop_cheapest()
            if cheapest is None and self.size_bytes > max(self._window_bytes, WINDOW_BYTES):
                cheapest = self._lanes.pop_oldest_step_end()
            if cheapest is None:
                return
            self._give_up(cheapest)

    def _give_up(self, unsent: Unsent) -> None:
        message = unsent.message
        self._accounts.drop(message.kind)
        if isinstance(message, StepEnd):
            self._ledger.end_dropped(message.step)
        elif message.kind in _STEP_KINDS:
            self._correct(self._ledger.part_dropped(_step_of(message), message.kind))

    def _correct(self, end: StepEnd | None) -> None:
        """Queue a ``StepEnd`` that has left with other counts again."""
        if end is not None:
            self._accounts.produce(end.kind)
            self._ledger.end_queued(end.step)
            self._lanes.add(self._lanes.wrap(end))

    def _pin(self, unsent: Unsent) -> None:
        """Encode ``unsent``, whose turn it is, and hold its bytes until it is acked."""
        message = unsent.message
        if isinstance(message, StepEnd):
            message = self._ledger.end_sent(message)
        envelope = self.envelope(self._sequence + 1)
        try:
            pieces = frames.split(envelope, frames.encode(envelope, message))
        except (ProtocolError, TypeError, ValueError, OverflowError) as error:
            self._not_encodable(unsent, error)
            return
        step = -1
        if message.kind in _STEP_KINDS:
            step = _step_of(message)
            self._ledger.part_sent(step)
        self._sequence += 1
        self._window.pin(Parcel(self._sequence, message.kind, tuple(pieces), step))
        self._make_room()

    def _not_encodable(self, unsent: Unsent, error: Exception) -> None:
        self.num_encode_errors += 1
        message = unsent.message
        self._complain(f"encode-{message.kind.name}", f"a {message.kind.name} cannot be sent and is dropped: {error}")
        if isinstance(message, StepEnd):
            self._accounts.drop(message.kind)  # the ledger has let go of it already
        else:
            self._give_up(unsent)
