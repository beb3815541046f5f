"""Making key files: one pair for the worker and one for the trainers of a run (docs/delivery.md, section 9)."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import zmq

from sidestep.protocol.keys import CLIENT_SECRET, CLIENTS, PUBLIC_SUFFIX, SERVER_PUBLIC, SERVER_SECRET
from sidestep.worker.errors import ConfigError

CLIENT_PUBLIC: Final = f"{CLIENTS}/client{PUBLIC_SUFFIX}"
_OWNER_ONLY: Final = 0o600


def make_keys(folder: Path) -> tuple[Path, ...]:
    """Make both pairs in ``folder``, whose files nobody else can read; return the files.

    Raises:
        ConfigError: the folder belongs to others or is open to them, holds keys already, or cannot be written; no key
            is ever replaced.
    """
    if not zmq.has("curve"):
        raise ConfigError("this build of ZeroMQ has no CURVE: install pyzmq's own wheel")
    server_public, server_secret = zmq.curve_keypair()
    client_public, client_secret = zmq.curve_keypair()
    contents = {
        SERVER_SECRET: ("the worker's own; it never leaves the worker's host", server_secret),
        SERVER_PUBLIC: ("the worker's public key; each trainer needs it", server_public),
        CLIENT_SECRET: ("the trainers' own; it goes to the hosts that train, and nowhere else", client_secret),
        CLIENT_PUBLIC: ("lets that trainer in; the worker needs it", client_public),
    }
    try:
        for each in (folder, folder / CLIENTS):
            _private_folder(each)
        for name in contents:
            if os.path.lexists(folder / name):
                raise ConfigError(
                    f"{folder / name} is there already and is kept: whoever uses it would be cut off. Choose another "
                    "folder, or delete the old keys first"
                )
        for name, (meaning, key) in contents.items():
            _write(folder / name, f"# {meaning}\n{key.decode('ascii')}\n")
    except OSError as error:
        raise ConfigError(f"keys cannot be written to {folder}: {error.strerror}") from error
    return tuple(folder / name for name in contents)


def _private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"{folder} belongs to others or is open to them; `chmod 700` it, or choose another folder")


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _OWNER_ONLY)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        os.fchmod(descriptor, _OWNER_ONLY)  # whatever the umask
        file.write(text)
