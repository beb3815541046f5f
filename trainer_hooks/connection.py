"""The sockets of a publisher: one DEALER and its monitor, never waited for. The trainer's only door to ZeroMQ.

No ZeroMQ heartbeats (they turn a pause of the worker into loss), no fixed routing id (after a half-open connection its
messages are discarded silently), small high-water marks (they count messages, whatever their size); docs/delivery.md,
section 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, cast

import zmq
from zmq.utils.monitor import recv_monitor_message

from sidestep.protocol.limits import (
    MAX_FRAME_BYTES,
    RECEIVE_HIGH_WATER_MARK_MESSAGES,
    SEND_HIGH_WATER_MARK_MESSAGES,
    TCP_KEEPALIVE_IDLE_SECONDS,
    TCP_KEEPALIVE_INTERVAL_SECONDS,
    TCP_KEEPALIVE_PROBES,
)
from sidestep.trainer_hooks.refusals import Handshake

if TYPE_CHECKING:
    from sidestep.protocol.endpoints import Endpoint
    from sidestep.protocol.keys import ClientKeys

_OUTCOMES: Final = {
    int(zmq.EVENT_HANDSHAKE_SUCCEEDED): Handshake.DONE,
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): Handshake.DROPPED,
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): Handshake.MISMATCH,
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): Handshake.UNKNOWN_KEY,
}
_KEEPALIVE: Final = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: TCP_KEEPALIVE_IDLE_SECONDS,
    zmq.TCP_KEEPALIVE_INTVL: TCP_KEEPALIVE_INTERVAL_SECONDS,
    zmq.TCP_KEEPALIVE_CNT: TCP_KEEPALIVE_PROBES,
}
"""An idle trainer notices within two minutes that the worker's host is gone; with something to say, within 15 s."""


def _is_readable(socket: zmq.Socket[bytes]) -> bool:
    """Ask without a system call, and without the exception that an empty ``recv`` costs."""
    return bool(cast("int", socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


class Connection(Protocol):
    """What a link asks of its socket; no call waits."""

    def receive(self) -> bytes | None:
        """Return one frame, or None."""

    def send(self, frame: bytes) -> bool:
        """Send one frame; False where there is no room for it now."""

    def handshakes(self) -> list[Handshake]:
        """Return what became of each handshake since the last call."""

    def close(self) -> None:
        """Close at once; what was not carried is forgotten."""


class Connector(Protocol):
    """Makes the connections of one publisher, on its thread."""

    def connect(self) -> Connection:
        """Return a new connection."""

    def close(self) -> None:
        """Let go of what all connections share; they are closed by then."""


class DealerConnection:
    """A DEALER socket and its monitor; made, used and closed by one thread."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: Endpoint, keys: ClientKeys | None = None
    ) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = SEND_HIGH_WATER_MARK_MESSAGES
        self._socket.rcvhwm = RECEIVE_HIGH_WATER_MARK_MESSAGES * 4
        self._socket.maxmsgsize = MAX_FRAME_BYTES
        self._socket.reconnect_ivl = 100
        self._socket.reconnect_ivl_max = 1_000
        if endpoint.transport == "tcp":
            self._socket.ipv6 = ":" in endpoint.host
            self._socket.connect_timeout = 2_000
            for option, value in _KEEPALIVE.items():
                self._socket.set(option, value)
        if keys is not None:
            secret = keys.secret_key.encode("ascii")
            self._socket.curve_secretkey, self._socket.curve_publickey = secret, zmq.curve_public(secret)
            self._socket.curve_serverkey = keys.server_key.encode("ascii")
        self._monitor = self._socket.get_monitor_socket(sum(_OUTCOMES))
        try:
            self._socket.connect(endpoint.address)
        except zmq.ZMQError:
            self.close()
            raise

    def receive(self) -> bytes | None:
        """Return one frame, or None."""
        if not _is_readable(self._socket):
            return None
        parts = self._socket.recv_multipart(zmq.NOBLOCK)
        return parts[-1]

    def send(self, frame: bytes) -> bool:
        """Send one frame; False where there is no room for it now."""
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def handshakes(self) -> list[Handshake]:
        """Return what became of each handshake since the last call."""
        seen: list[Handshake] = []
        while _is_readable(self._monitor):
            event = int(recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"])
            if event in _OUTCOMES:  # the monitor's own end is none
                seen.append(_OUTCOMES[event])
        return seen

    def close(self) -> None:
        """Close both sockets at once."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)


class DealerConnector:
    """Makes connections to one endpoint; a host's name is looked up anew whenever one of them is (re)made."""

    def __init__(self, endpoint: Endpoint, keys: ClientKeys | None = None) -> None:
        self._endpoint = endpoint
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    def connect(self) -> Connection:
        """Return a new connection.

        Raises:
            zmq.ZMQError: the system has no socket left, or takes no such address.
        """
        if self._context is None:
            self._context = zmq.Context(io_threads=1)
        return DealerConnection(self._context, self._endpoint, self._keys)

    def close(self) -> None:
        """End ZeroMQ's own threads."""
        if self._context is not None:
            self._context.term()
            self._context = None
