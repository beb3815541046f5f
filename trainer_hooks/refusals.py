"""What became of a handshake, and what people are told about one that failed."""

from __future__ import annotations

from enum import Enum


class Handshake(Enum):
    """The end of one try to connect, as the trainer's side sees it."""

    DONE = "done"
    DROPPED = "dropped"
    """The other side hung up: it expects other keys, or it went away. The socket tries again by itself."""
    MISMATCH = "mismatch"
    """The worker speaks with keys and this side without. The socket never tries again (libzmq 4.3.5)."""
    UNKNOWN_KEY = "unknown key"
    """The worker does not know this trainer's key. The socket never tries again."""


def why_refused(outcome: Handshake, address: str, *, has_keys: bool) -> str:
    """Return the one line for the trainer's console: what is wrong, and what to do about it."""
    if outcome is Handshake.UNKNOWN_KEY:
        what = (
            f"the worker at {address} refuses the handshake: it does not know this trainer's key. Copy the "
            "client.secret that 'sidestep keys' made for it to SIDESTEP_KEYS here, or this key's public half to the "
            "worker's clients/ folder"
        )
    elif has_keys:  # a worker without keys hangs up just as one with other keys does
        what = (
            f"what answers at {address} breaks off the handshake: it does not hold the key that this trainer expects, "
            "or none. Start the worker with SIDESTEP_KEYS, and copy its server.public to SIDESTEP_KEYS here"
        )
    else:
        what = (
            f"what answers at {address} refuses the handshake: this trainer has no keys. If it is a worker with keys, "
            "set SIDESTEP_KEYS to the folder that 'sidestep keys' made"
        )
    return f"{what}. Training goes on; it is tried again from time to time."
