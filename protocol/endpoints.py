"""Where a worker listens: ``ipc://`` sockets in a private folder, or ``tcp://`` on loopback (CURVE elsewhere)."""

from __future__ import annotations

import ipaddress
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sidestep.protocol.errors import EndpointError
from sidestep.protocol.limits import MAX_IPC_PATH_BYTES

_TCP = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.%]+\]|[^\s/:\[\]]+):(?P<port>\d{1,5}|\*)\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One address, checked."""

    address: str
    """As ZeroMQ takes it."""
    transport: str
    """``ipc`` or ``tcp``."""
    path: Path | None = None
    """The socket's file, for ``ipc``."""
    host: str = ""
    port: int = 0
    """0 for ``*``: any free port."""

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Return the endpoint that ``text`` names.

        Raises:
            EndpointError: not ``ipc://PATH`` or ``tcp://HOST:PORT``, or a socket path too long for the system.
        """
        if text.startswith("ipc://"):
            return cls._parse_ipc(text)
        match = _TCP.match(text)
        if match is None or (match["port"] != "*" and not 0 < int(match["port"]) < 65_536):
            raise EndpointError(f"the endpoint {text!r} is neither ipc://PATH nor tcp://HOST:PORT")
        return cls(
            address=text,
            transport="tcp",
            host=match["host"].strip("[]"),
            port=0 if match["port"] == "*" else int(match["port"]),
        )

    @classmethod
    def _parse_ipc(cls, text: str) -> Endpoint:
        path = text.removeprefix("ipc://")
        if not path.startswith("/"):
            raise EndpointError(
                f"the endpoint {text!r} needs an absolute path: abstract and relative sockets are open to others"
            )
        if len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
            raise EndpointError(
                f"the socket path {path!r} has more than {MAX_IPC_PATH_BYTES} bytes; "
                "set SIDESTEP_RUNTIME to a shorter folder"
            )
        return cls(address=text, transport="ipc", path=Path(path))

    @property
    def is_private(self) -> bool:
        """Whether only this host can reach it: a socket file or a loopback address.

        Names other than ``localhost`` are not looked up.
        """
        if self.transport == "ipc" or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.split("%")[0]).is_loopback
        except ValueError:
            return False


def runtime_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Return the folder for sockets.

    ``SIDESTEP_RUNTIME``, else ``/run/user/UID/sidestep``, else ``sidestep-UID`` in the temporary folder.

    The folder is not made here; its maker gives it mode 0700 and checks its owner.
    """
    environment = os.environ if environment is None else environment
    if chosen := environment.get("SIDESTEP_RUNTIME"):
        return Path(chosen)
    user = Path(f"/run/user/{os.getuid()}")
    if user.is_dir() and os.access(user, os.W_OK):
        return user / "sidestep"
    return Path(tempfile.gettempdir()) / f"sidestep-{os.getuid()}"


def default_endpoint(environment: Mapping[str, str] | None = None) -> Endpoint:
    """Return where a worker listens when nobody says otherwise: ``worker.sock`` in ``runtime_folder``.

    Raises:
        EndpointError: the folder's path is too long for a socket.
    """
    return Endpoint.parse(f"ipc://{runtime_folder(environment) / 'worker.sock'}")
