"""Where messages go: one interface, two ways. Users run the publisher; the other stays in the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import Command, Hello, Message
from sidestep.trainer_hooks.staging import Staging


class Transport(Protocol):
    """What the hooks ask of a way to the worker; every call returns at once, ``close`` within its time."""

    def submit(self, message: Message) -> None:
        """Take a message over."""
        ...

    def take_command(self) -> Command | None:
        """The oldest command that nobody took."""
        ...

    def close(self, timeout_seconds: float = 5.0, *, exit_code: int = 0, reason: str = "") -> None:
        """Say goodbye, and wait at most so long."""
        ...


OpenTransport: TypeAlias = Callable[[Envelope, Hello, Mapping[str, bytes], Staging], Transport]
"""(identity, hello, blobs by digest, staging) to a transport that runs."""


class InProcessTransport:
    """Keeps messages in a list, for whoever wants them in this process; nothing leaves it."""

    def __init__(self, identity: Envelope, hello: Hello, blobs: Mapping[str, bytes], source: Staging) -> None:
        self.identity = identity
        self.hello = hello
        self.blobs = dict(blobs)
        self.commands: list[Command] = []
        self.closed: str | None = None
        """``close``'s reason, once it was called."""
        self._source = source
        self._messages: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """All messages so far, those whose copies have arrived included."""
        self._source.advance()
        self._messages += self._source.poll()
        return self._messages

    def submit(self, message: Message) -> None:
        """Keep a message."""
        self._messages.append(message)

    def take_command(self) -> Command | None:
        """The oldest command in ``commands``."""
        return self.commands.pop(0) if self.commands else None

    def close(self, timeout_seconds: float = 5.0, *, exit_code: int = 0, reason: str = "") -> None:
        """Remember that it was closed."""
        del timeout_seconds
        self.closed = reason or str(exit_code)
