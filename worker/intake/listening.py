"""Where a worker may listen, and that it is alone there.

Sockets lie in a folder of the user's own with mode 0700; a lock beside the socket says who serves it, so that a
socket file left behind by a killed worker can be replaced, and one in use never is (docs/delivery.md, 8 to 10).
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from pathlib import Path
from typing import Final

from sidestep.protocol.endpoints import Endpoint, runtime_folder
from sidestep.worker.errors import EndpointBusyError, ListenError
from sidestep.worker.intake.owners import Owners

_LOG: Final = logging.getLogger(__name__)


def private_folder(folder: Path) -> None:
    """Make ``folder`` with mode 0700, or check that it is ours alone.

    Raises:
        ListenError: it cannot be made, belongs to someone else, or others may enter or replace it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found, parent = folder.lstat(), folder.parent.stat()
    except OSError as error:
        raise ListenError(f"the socket folder {folder} cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ListenError(f"the socket folder {folder} is not a folder of this user; set SIDESTEP_RUNTIME to one")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ListenError(f"others may enter the socket folder {folder}; `chmod 700` it, or set SIDESTEP_RUNTIME")
    if parent.st_mode & 0o022 and not parent.st_mode & stat.S_ISVTX:
        raise ListenError(f"others may replace the socket folder {folder}: {folder.parent} is theirs to write")


def close_to_others(path: Path) -> None:
    """Take the permission to connect to the socket ``path`` from everyone but its owner.

    Raises:
        ListenError: it cannot be changed.
    """
    try:
        path.chmod(0o600)
    except OSError as error:
        raise ListenError(f"the socket {path} cannot be closed to others: {error.strerror}") from error


class EndpointLock:
    """Held by the one worker that serves an endpoint, for as long as its process lives."""

    def __init__(self, endpoint: Endpoint, *, has_keys: bool = False, owner_pid: int = 0) -> None:
        """Take the lock for a worker that stays for ``owner_pid``; remove a socket that a killed worker left behind.

        Raises:
            EndpointBusyError: another worker serves it.
            ListenError: it must not be listened on: off loopback nobody is, without keys.
        """
        if not (endpoint.is_private or has_keys):
            raise ListenError(
                f"{endpoint.address} can be reached from other hosts, and there are no key files for it: make them "
                "with `sidestep keys DIR` and give --keys DIR, or listen on ipc://PATH or tcp://127.0.0.1:PORT"
            )
        base = _beside(endpoint)
        private_folder(base.parent)
        self._descriptor = -1
        self._owners: Owners | None = None
        if endpoint.transport == "tcp" and endpoint.port == 0:
            return  # any free port: nobody else can have it
        self._descriptor = _taken(base.with_name(f"{base.name}.lock"), endpoint)
        self._owners = owners_at(endpoint)
        self._owners.begin(owner_pid)
        if endpoint.path is not None:
            _remove_stale(endpoint.path)

    def has_owner(self) -> bool:
        """Return whether a process lives that the worker stays for."""
        try:
            return self._owners is not None and self._owners.any_alive()
        except ListenError as error:
            _LOG.warning("nobody is stayed for: %s", error)
            return False

    def close_to_owners(self, *, at_once: bool = False) -> bool:
        """Take no further owner where none lives, or ``at_once``; return whether that is so now."""
        try:
            return self._owners is None or self._owners.close(at_once=at_once)
        except ListenError as error:
            _LOG.warning("nobody is stayed for: %s", error)
            return True

    def release(self) -> None:
        """Let another worker serve the endpoint."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def owners_at(endpoint: Endpoint) -> Owners:
    """Return whom the worker at ``endpoint`` stays for, for who finds it busy."""
    base = _beside(endpoint)
    return Owners(base.with_name(f"{base.name}.owners"))


def _beside(endpoint: Endpoint) -> Path:
    """The place of the files that say who serves an endpoint, without their endings."""
    if endpoint.path is not None:
        return endpoint.path
    name = f"tcp-{endpoint.host}-{endpoint.port}"
    return runtime_folder() / name.replace(":", "_").replace("*", "any")


def _taken(path: Path, endpoint: Endpoint) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ListenError(f"the lock {path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise EndpointBusyError(f"another worker serves {endpoint.address}") from None
    return descriptor


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(f"{path} is there and is no socket; it is left alone")
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ListenError(f"the stale socket {path} cannot be removed: {error.strerror}") from error
