"""Where faults strike on the trainer's side. Nothing of this module is in the way of a publisher without a plan.

| point | passes | fail | stall | drop | delay |
| --- | --- | --- | --- | --- | --- |
| ``trainer.stage`` | a copy, on the training thread | raises in the hook | | no room: counted | done later |
| ``trainer.finish`` | a finished copy | the measurement fails | the thread sleeps | counted as dropped | |
| ``trainer.take`` | a message handed over | | the thread sleeps | counted as dropped | taken later |
| ``trainer.tick`` | a tick | raises in the tick | the thread sleeps | | |
| ``trainer.send`` | a frame to the worker | raises in the tick | no room | lost unseen | sent later |
| ``trainer.receive`` | a frame from the worker | raises in the tick | nothing arrives | lost unseen | seen later |
| ``trainer.handshake`` | the connection | refused for good | | | |

All but the first on the publisher's thread. An action without an entry does nothing there but count. ``step`` of a tick
or a frame is the newest step that was handed over.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from sidestep.protocol import frames
from sidestep.protocol.errors import ProtocolError
from sidestep.protocol.faults import Action, Fault, Faults, InjectedFaultError
from sidestep.protocol.messages import STEP_KINDS, Kind, Message
from sidestep.trainer_hooks.connection import Connection, Connector
from sidestep.trainer_hooks.delivery import Delivery
from sidestep.trainer_hooks.refusals import Handshake

STAGE: Final = "trainer.stage"
FINISH: Final = "trainer.finish"
TAKE: Final = "trainer.take"
TICK: Final = "trainer.tick"
SEND: Final = "trainer.send"
RECEIVE: Final = "trainer.receive"
HANDSHAKE: Final = "trainer.handshake"
POINTS: Final = (STAGE, FINISH, TAKE, TICK, SEND, RECEIVE, HANDSHAKE)


def _kind_name(frame: bytes) -> str:
    try:
        return Kind(frames.peek(frame).kind).name.lower()
    except (ProtocolError, ValueError):
        return ""  # not a frame of ours: only faults that name no kind are about it


class _Passage:
    """One direction of a connection: what is held up, and until when."""

    def __init__(self) -> None:
        self.stalled_until = 0.0
        self.held: deque[tuple[float, bytes]] = deque()

    def suffer(self, fault: Fault, frame: bytes) -> None:
        now = time.monotonic()
        if fault.action is Action.FAIL:
            raise InjectedFaultError(f"{fault.where} fails on purpose")
        if fault.action is Action.STALL:
            self.stalled_until = now + fault.seconds
        elif fault.action is Action.DELAY:
            self.held.append((now + fault.seconds, frame))

    @property
    def is_stalled(self) -> bool:
        return time.monotonic() < self.stalled_until

    def released(self) -> bytes | None:
        """Return the oldest held frame if its time has come; it stays until ``pass_on``."""
        return self.held[0][1] if self.held and self.held[0][0] <= time.monotonic() else None


class FaultyConnection:
    """A connection on which faults strike; order is kept, so that a delayed frame delays those behind it."""

    def __init__(self, inner: Connection, ask: Callable[[str, str], Fault | None]) -> None:
        self._inner = inner
        self._ask = ask
        self._out, self._in = _Passage(), _Passage()

    def send(self, frame: bytes) -> bool:
        """Send one frame, or what the plan makes of it."""
        while (due := self._out.released()) is not None and self._inner.send(due):
            self._out.held.popleft()
        if self._out.is_stalled:
            return False
        if self._out.held:
            self._out.held.append((0.0, frame))
            return True
        fault = self._ask(SEND, _kind_name(frame))
        if fault is None:
            return self._inner.send(frame)
        self._out.suffer(fault, frame)
        return fault.action is not Action.STALL

    def receive(self) -> bytes | None:
        """Return one frame, or what the plan leaves of it."""
        while not self._in.is_stalled and (frame := self._inner.receive()) is not None:
            fault = self._ask(RECEIVE, _kind_name(frame))
            if fault is not None:
                self._in.suffer(fault, frame)
            if fault is None or fault.action is Action.STALL:
                if not (self._in.held or self._in.is_stalled):
                    return frame
                self._in.held.append((0.0, frame))
        if self._in.is_stalled or (due := self._in.released()) is None:
            return None
        self._in.held.popleft()
        return due

    def handshakes(self) -> list[Handshake]:
        """Return what became of handshakes; a fault that fails is one that was refused."""
        fault = self._ask(HANDSHAKE, "")
        refused = [Handshake.MISMATCH] if fault is not None and fault.action is Action.FAIL else []
        return [*refused, *self._inner.handshakes()]

    def close(self) -> None:
        """Close it; what was held up is lost, as on a broken link."""
        self._inner.close()


class FaultyConnector:
    """Makes connections on which faults strike."""

    def __init__(self, inner: Connector, faults: Faults, *, rank: int, newest_step: Callable[[], int]) -> None:
        self._inner = inner
        self._faults = faults
        self._rank = rank
        self._newest_step = newest_step

    def connect(self) -> Connection:
        """Return a new connection."""
        return FaultyConnection(self._inner.connect(), self._ask)

    def close(self) -> None:
        """Let go of what all connections share."""
        self._inner.close()

    def _ask(self, where: str, kind: str) -> Fault | None:
        return self._faults.strike(where, rank=self._rank, step=self._newest_step(), kind=kind)


class FaultyIntake:
    """What happens to messages between the hook and the lanes, and to the tick itself."""

    def __init__(self, faults: Faults, delivery: Delivery, *, rank: int) -> None:
        self._faults = faults
        self._delivery = delivery
        self._rank = rank
        self._held: list[tuple[float, Message]] = []

    def at_tick(self, newest_step: int) -> None:
        """Let the tick fail, or sleep; then let in the delayed messages whose time has come."""
        self._let_in(time.monotonic())
        self._faults.act(TICK, rank=self._rank, step=newest_step)

    def take(self, message: Message) -> None:
        """Let ``message`` in, or not, or not yet."""
        step = getattr(message, "step", -1)
        fault = self._faults.strike(TAKE, rank=self._rank, step=step, kind=message.kind.name.lower())
        if fault is not None and fault.action is Action.DROP:
            self._delivery.skip(message.kind, step, announced=message.kind in STEP_KINDS)
            return
        if fault is not None and fault.action is Action.DELAY:
            self._held.append((time.monotonic() + fault.seconds, message))
            return
        if fault is not None:
            time.sleep(fault.seconds)
        self._delivery.take(message)

    def release(self) -> None:
        """Let in all that is delayed: the publisher ends."""
        self._let_in(float("inf"))

    def _let_in(self, now: float) -> None:
        due = [message for until, message in self._held if until <= now]
        self._held = [entry for entry in self._held if entry[0] > now]
        for message in due:
            self._delivery.take(message)
