"""Where messages come from that the publisher thread itself finishes."""

from __future__ import annotations

from typing import Protocol

from sidestep.protocol.messages import Message
from sidestep.trainer_hooks.accounts import Skip


class Source(Protocol):
    """What ``staging.Staging`` is to the publisher, which needs no torch."""

    def advance(self) -> None:
        """Look, on the training thread, for copies that are done; never wait."""

    def poll(self) -> list[Message]:
        """Finish, on the publisher thread, what is ready; never wait."""

    def take_skips(self) -> list[Skip]:
        """Return the messages that never came to be since the last call."""

    @property
    def num_pending(self) -> int:
        """Entries that are not finished."""
