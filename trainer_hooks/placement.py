"""Where rank 0 puts the worker that nobody has placed: a private socket, or an address that the other hosts reach."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

from sidestep.protocol.endpoints import Endpoint, default_endpoint, runtime_folder
from sidestep.protocol.errors import EndpointError
from sidestep.protocol.keys import KEYS_VARIABLE, SERVER_SECRET, keys_folder
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.launch_identity import launch_identity, num_nodes

FAR_AWAY = "192.0.2.1"
"""An address that nobody has (RFC 5737)."""
_ANY_PORT = 9
"""Nothing is sent there: the kernel only chooses the address that it would send from."""


def choose_endpoint(environment: Mapping[str, str], console: Console) -> Endpoint:
    """Return where a worker is to listen that this process starts.

    On one host a private socket. On several an address of this host with a free port, where there are keys; started
    again by the same agent, the one that was chosen before. Without keys a private socket again, and a line says so.

    Raises:
        EndpointError: the socket's path is too long.
    """
    here = default_endpoint(environment)
    nodes = num_nodes(environment)
    if nodes <= 1:
        return here
    folder = keys_folder(environment)
    if folder is None or not (folder / SERVER_SECRET).exists():
        console.once(
            "no-keys",
            f"the training runs on {nodes} nodes and there are no keys: ranks on other hosts than this one go on "
            f"without hooks. Make keys with `sidestep keys DIR` and set {KEYS_VARIABLE}=DIR on every node.",
        )
        return here
    # A name that stands for loopback in this host's own list of names (Debian's habit) says nothing; the default route
    # does.
    address = reachable_address(environment.get("MASTER_ADDR", "")) or reachable_address(FAR_AWAY)
    if not address:
        console.once(
            "no-address",
            "no address of this host is known that other hosts reach: ranks there go on without hooks. Start "
            "`sidestep worker --endpoint tcp://ADDRESS:PORT` and set SIDESTEP_ENDPOINT to that on every node.",
        )
        return here
    return _remembered(environment, address, console)


def reachable_address(other: str) -> str:
    """Return this host's address on the way to ``other`` (the group's meeting place); "" where that is loopback."""
    with suppress(OSError):  # a name that nobody knows: the caller says what to do
        for family, kind, _, _, place in socket.getaddrinfo(other or None, _ANY_PORT, type=socket.SOCK_DGRAM):
            with closing(socket.socket(family, kind)) as probe:
                probe.connect(place)
                found = str(probe.getsockname()[0])
            shown = f"[{found}]" if ":" in found else found
            if not Endpoint.parse(f"tcp://{shown}:1").is_private:
                return shown
    return ""


def _remembered(environment: Mapping[str, str], address: str, console: Console) -> Endpoint:
    identity = launch_identity(environment)
    note = runtime_folder(environment) / f"launch-{identity}"
    if identity:
        with suppress(FileNotFoundError, EndpointError):  # the first start of this launch
            return Endpoint.parse(note.read_text("ascii").strip())
    chosen = Endpoint.parse(f"tcp://{address}:{_free_port(address)}")
    if identity:
        try:
            _write(note, chosen.address)
        except OSError as error:
            console.once("launch-note", f"{note} cannot be written ({error}): a restart will start another worker.")
    return chosen


def _write(note: Path, text: str) -> None:
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def _free_port(address: str) -> int:
    host = address.strip("[]")
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port
