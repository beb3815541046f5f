"""What can go wrong with bytes and endpoints, by what the caller must do.

::

    ProtocolError
    +-- EncodeError            a message breaks its own schema or a limit: a mistake in the sender, fix the code
    +-- DecodeError            these bytes are not a message: refuse and count them, never retry
    |   +-- LimitExceededError a declared size is over limits.py: refused before anything is allocated
    +-- IncompatibleWireError  the peer speaks another major version: tell it (Reject) and stop talking
    +-- EndpointError          an address that cannot or must not be used: a mistake in the configuration
        +-- KeyFileError       its keys are missing, unreadable, or readable by others: the text says what to do
"""

from __future__ import annotations


class ProtocolError(Exception):
    """Base of all errors of the protocol."""


class EncodeError(ProtocolError):
    """A message does not fit its own schema or a limit; raised to the sender, before anything is sent."""


class DecodeError(ProtocolError):
    """Bytes that are not a message of this protocol; the receiver refuses and counts them."""


class LimitExceededError(DecodeError):
    """A declared length, shape or count is over its limit in ``limits.py``; nothing was allocated for it."""


class IncompatibleWireError(ProtocolError):
    """The peer speaks another major version of the wire."""

    def __init__(self, major: int, minor: int) -> None:
        """Remember the peer's version, so that the answer can name it."""
        super().__init__(
            f"the peer speaks wire version {major}.{minor}, which this side does not; "
            "install the same major version of sidestep on both sides"
        )
        self.major = major
        self.minor = minor


class EndpointError(ProtocolError, ValueError):
    """An endpoint that is malformed, too long, or would listen where it must not."""


class KeyFileError(EndpointError):
    """A key file that is missing, is no key, or that others may read; the text says what to do."""
