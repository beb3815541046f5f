"""Where a worker may listen, and that it is alone there.

Sockets lie in a folder of the user's own with mode 0700; a lock beside the socket says who serves it, so that a
socket file left behind by a killed worker can be replaced, and one in use never is (docs/delivery.md, 8 to 10).
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from sidestep.protocol.endpoints import Endpoint, runtime_folder
from sidestep.worker.errors import EndpointBusyError, ListenError


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

    def __init__(self, endpoint: Endpoint) -> None:
        """Take the lock; for ``ipc`` also remove a socket that a killed worker left behind.

        Raises:
            EndpointBusyError: another worker serves it.
            ListenError: it must not be listened on.
        """
        if not endpoint.is_private:
            raise ListenError(
                f"{endpoint.address} can be reached from other hosts, and this version has no key files for it: "
                "listen on ipc://PATH or tcp://127.0.0.1:PORT, and tunnel from elsewhere"
            )
        folder = endpoint.path.parent if endpoint.path is not None else runtime_folder()
        private_folder(folder)
        name = endpoint.path.name if endpoint.path is not None else f"tcp-{endpoint.host}-{endpoint.port}"
        self._descriptor = -1
        if endpoint.transport == "tcp" and endpoint.port == 0:
            return  # any free port: nobody else can have it
        self._descriptor = _taken(folder / f"{name.replace(':', '_')}.lock", endpoint)
        if endpoint.path is not None:
            _remove_stale(endpoint.path)

    def release(self) -> None:
        """Let another worker serve the endpoint."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


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
