"""What is said on a connection, without a socket: Hello, Welcome, blobs, data, acks, heartbeats, and when to hang up.

A Welcome comes whenever the worker does not know the connection: at the start, after a restart of the worker, after a
broken link. Whatever was on its way may be lost then, so all that is unacked is sent again, in order, after a Welcome
and only after one (docs/delivery.md, section 5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sidestep.protocol import frames
from sidestep.protocol.errors import DecodeError, IncompatibleWireError
from sidestep.protocol.frames import UnknownMessage
from sidestep.protocol.limits import WINDOW_BYTES
from sidestep.protocol.messages import (
    Ack,
    Blob,
    Command,
    Heartbeat,
    Hello,
    Message,
    NoAck,
    Notice,
    Refuse,
    Reject,
    Welcome,
)
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.delivery import Delivery

_HELLO_AGAIN_SECONDS = 1.0
"""A Welcome that does not know our Hello is answered with it, unless one is on its way since so short a time."""
_BLOB_AGAIN_SECONDS = 10.0
"""A blob that is still asked for so long after it was sent is sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a publisher waits for what."""

    progress_seconds: float = 15.0
    """Without a Welcome, or without progress of acks while something is unacked: another connection."""
    heartbeat_seconds: float = 2.0
    """Between two heartbeats."""
    warning_seconds: float = 10.0
    """Without any Welcome since the start: one line on the console."""

    def __post_init__(self) -> None:
        """Raise ValueError for a time that is not positive."""
        for name in ("progress_seconds", "heartbeat_seconds", "warning_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Patience.{name} is {getattr(self, name)}; it must be positive")


class Conversation:
    """One publisher's talk with whatever worker answers at its endpoint."""

    def __init__(
        self,
        delivery: Delivery,
        hello: Hello,
        blobs: Mapping[str, bytes],
        *,
        console: Console,
        on_command: Callable[[Command], None],
        now: float,
        patience: Patience | None = None,
    ) -> None:
        """Begin before any connection.

        Raises:
            EncodeError: ``hello`` cannot travel; the caller's configuration has to change.
        """
        self._delivery = delivery
        self._blobs = blobs
        self._console = console
        self._on_command = on_command
        self._patience = patience or Patience()
        envelope = delivery.envelope()
        self._hello_frames = frames.split(envelope, frames.encode(envelope, hello))
        self._control: deque[bytes] = deque()
        self._blobs_due: deque[str] = deque()
        self._blob_frames: deque[bytes] = deque()
        self._blob_sent_at: dict[str, float] = {}
        self._last_returned = ""
        self._started_at = self._opened_at = self._last_progress = self._heartbeat_at = self._hello_at = now
        self._welcomed = False
        self._quiet_until = now
        self.newest_step = -1
        """Newest step that a ``StepEnd`` named; travels in heartbeats."""
        self.last_answer_at: float | None = None
        """When the last Welcome or settling ack came; None before the first."""
        self.rejected = False
        """True once the worker refuses to talk to this publisher."""
        self.num_welcomes = 0
        self.num_undecodable = 0
        """Frames from the worker that are no message of ours, or of a kind that no worker sends."""

    # ------------------------------------------------------------------------------------------------- out

    def has_more(self, now: float) -> bool:
        """Return whether there is something that may be sent now, repeats included."""
        if self.rejected:
            return False
        if self._control:
            return True
        if not self._welcomed:
            return False
        return bool(self._blobs_due or self._blob_frames) or (
            now >= self._quiet_until and self._delivery.num_to_send > 0
        )

    def silent_seconds(self, now: float) -> float:
        """Return for how long the worker has owed an answer; 0 where nothing waits for one. Any thread may ask."""
        if not self._welcomed:
            return now - (self._started_at if self.last_answer_at is None else self.last_answer_at)
        return now - self._last_progress if self._delivery.num_unacked else 0.0

    def opened(self, now: float) -> None:
        """Begin again on a new connection: Hello first, data after the Welcome."""
        self._welcomed = False
        self._opened_at = now
        self._blob_frames.clear()
        self._say_hello(now)

    def reconnected(self, now: float) -> None:
        """Make the worker notice a connection that came back under our feet, by whatever message comes first."""
        if self._welcomed:
            self._heartbeat_at = now
        else:
            self._say_hello(now)

    def next_frame(self, now: float) -> bytes | None:
        """Return the frame to send next; None when there is nothing that may be sent now."""
        if self.rejected:
            return None
        if self._welcomed and now >= self._heartbeat_at and not self._control:
            self._heartbeat_at = now + self._patience.heartbeat_seconds
            self._control.append(frames.encode(self._delivery.envelope(), Heartbeat(newest_step=self.newest_step)))
        if self._control:
            self._last_returned = "control"
            return self._control[0]
        if not self._welcomed:
            return None
        if not self._blob_frames and self._blobs_due:
            self._encode_blob(self._blobs_due.popleft(), now)
        if self._blob_frames:
            self._last_returned = "blob"
            return self._blob_frames[0]
        if now < self._quiet_until:
            return None
        if self._delivery.num_unacked == 0:
            self._last_progress = now
        self._last_returned = "data"
        return self._delivery.next_frame()

    def frame_sent(self) -> None:
        """Go on after the frame that ``next_frame`` returned."""
        if self._last_returned == "control":
            self._control.popleft()
        elif self._last_returned == "blob":
            self._blob_frames.popleft()
        else:
            self._delivery.frame_sent()

    def wants_new_connection(self, now: float) -> bool:
        """Return whether this connection has been silent for too long."""
        if self.rejected:
            return False
        if not self._welcomed:
            return now - self._opened_at > self._patience.progress_seconds
        return self._delivery.num_unacked > 0 and now - self._last_progress > self._patience.progress_seconds

    def is_alone(self, now: float) -> bool:
        """Return whether no worker has answered since the start, which is long enough ago to say so."""
        waited = now - self._started_at
        return self.num_welcomes == 0 and not self.rejected and waited > self._patience.warning_seconds

    def warn_if_alone(self, now: float, address: str) -> None:
        """Say once that no worker answers, or that one does not answer any more."""
        patience = self._patience
        too_long = patience.warning_seconds + 2 * patience.progress_seconds
        if self.num_welcomes and self._delivery.num_unacked and now - self._last_progress > too_long:
            self._console.once(
                "silent",
                f"the worker at {address} has stored nothing for {too_long:.0f} s. Training goes on; up to "
                f"{WINDOW_BYTES >> 20} MiB of measurements are kept until it does, then the cheapest are dropped "
                "and counted.",
            )
        if self.is_alone(now):
            self._console.once(
                "alone",
                f"no worker answers at {address}. Training goes on; up to {WINDOW_BYTES >> 20} MiB of measurements "
                "are kept until one does, then the cheapest are dropped and counted.",
            )

    # ------------------------------------------------------------------------------------------------- in

    def received(self, frame: bytes, now: float) -> None:
        """Take one frame from the worker; what is not a message is counted and changes nothing."""
        try:
            _, message = frames.decode(frame)
            self._take(message, now)
        except IncompatibleWireError as error:
            self.num_undecodable += 1
            self._reject(str(error))  # its Reject, if this is one, is of a version that cannot be read
        except (DecodeError, ValueError) as error:
            self.num_undecodable += 1
            self._console.once("undecodable", f"the worker sent what is not a message ({error}); it is left out.")

    def _take(self, message: Message | UnknownMessage, now: float) -> None:
        match message:
            case Welcome():
                self._on_welcome(message, now)
            case Ack():
                self._on_ack(message, now)
            case Refuse():
                self._on_refuse(message, now)
            case NoAck():
                self._quiet_until = now + self._patience.progress_seconds
                self._console.once("no-ack", f"the worker cannot store what it gets: {message.reason}")
            case Reject():
                self._reject(message.reason)
            case Notice():
                self._console.line(message.text, apart=message.level != "info")
            case Command():
                self._on_command(message)
            case UnknownMessage():
                pass  # of a later minor version: what it asks for is optional
            case _:
                self.num_undecodable += 1

    def _reject(self, reason: str) -> None:
        self.rejected = True
        text = f"the worker refuses this trainer: {reason.rstrip('.')}. Training goes on without it."
        self._console.once("reject", text)

    def _on_welcome(self, welcome: Welcome, now: float) -> None:
        self._delivery.acknowledge(welcome.committed)
        self._delivery.resend()
        self.num_welcomes += 1
        self._welcomed = True
        self._quiet_until = now
        self._progress(now)
        if not welcome.hello_known and now - self._hello_at > _HELLO_AGAIN_SECONDS:
            self._say_hello(now)
        self._blob_frames.clear()
        self._blob_sent_at.clear()
        self._blobs_due.clear()
        self._owe_blobs(welcome.wanted, now)

    def _on_ack(self, ack: Ack, now: float) -> None:
        if self._delivery.acknowledge(ack.committed):
            self._quiet_until = now
            self._progress(now)
        self._owe_blobs(ack.wanted, now)

    def _on_refuse(self, refuse: Refuse, now: float) -> None:
        if self._delivery.refuse(refuse.sequence):
            self._progress(now)
            self._console.once("refused", f"the worker refuses a message and it is lost: {refuse.reason}")

    def _progress(self, now: float) -> None:
        self._last_progress = self.last_answer_at = now

    def _say_hello(self, now: float) -> None:
        self._hello_at = now
        self._control = deque(self._hello_frames)

    def _owe_blobs(self, wanted: tuple[str, ...], now: float) -> None:
        for digest in wanted:
            sent_at = self._blob_sent_at.get(digest)
            is_old = sent_at is None or (now - sent_at > _BLOB_AGAIN_SECONDS and not self._blob_frames)
            if digest in self._blobs and is_old and digest not in self._blobs_due:
                self._blobs_due.append(digest)

    def _encode_blob(self, digest: str, now: float) -> None:
        self._blob_sent_at[digest] = now
        envelope = self._delivery.envelope()
        frame = frames.encode(envelope, Blob(digest=digest, content=self._blobs[digest]))
        self._blob_frames.extend(frames.split(envelope, frame))
