"""Who may connect from another host: CURVE on the worker's socket, and the list of keys that it lets in.

libzmq asks over ZAP (RFC 27) whether a client's key is known, before any frame of it is delivered: what a stranger
sends is never decoded. Everything here belongs to the receiver's thread, which attends to it once a turn.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeAlias, cast

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from sidestep.protocol.errors import KeyFileError
from sidestep.protocol.keys import ServerKeys, client_keys_in

_LOG: Final = logging.getLogger(__name__)
_ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"
_ZAP_PARTS: Final = 7
_DOMAIN: Final = b"sidestep"
_PER_TURN: Final = 64
_MECHANISM_MISMATCH: Final = 0x11000002
_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL

_Socket: TypeAlias = zmq.Socket[bytes]
_Signature: TypeAlias = tuple[tuple[str, int, int, int], ...]


class AllowedKeys:
    """The public keys in a folder, read again when a file in it comes, goes or changes."""

    def __init__(self, folder: Path) -> None:
        """Read nothing yet."""
        self._folder = folder
        self._signature: _Signature | None = None
        self._keys: frozenset[str] = frozenset()
        self._complaint = ""

    def __contains__(self, key: object) -> bool:
        """Return whether a key, in Z85, is among them now; a folder that cannot be read lets nobody in."""
        try:
            signature = self._look()
            if signature != self._signature:
                self._keys = client_keys_in(self._folder)
                self._signature, self._complaint = signature, ""
        except (KeyFileError, OSError) as error:
            self._keys, self._signature = frozenset(), None
            if str(error) != self._complaint:
                self._complaint = str(error)
                _LOG.error("nobody new is let in: %s", error)
        return key in self._keys

    def _look(self) -> _Signature:
        found = [(each.name, each.stat()) for each in self._folder.iterdir()]
        return tuple(sorted((name, status.st_mtime_ns, status.st_size, status.st_ino) for name, status in found))


class Authentication:
    """Secures one listening socket, and counts who was let in and who was not."""

    def __init__(self, context: zmq.Context[_Socket], socket: _Socket, keys: ServerKeys) -> None:
        """Give ``socket`` its key, before it is bound."""
        self._allowed = AllowedKeys(keys.clients)
        self._counts: Counter[str] = Counter()
        self._asked = context.socket(zmq.REP)
        self._asked.set(zmq.LINGER, 0)
        self._asked.bind(_ZAP_ADDRESS)
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, keys.secret_key.encode("ascii"))
        socket.set(zmq.ZAP_DOMAIN, _DOMAIN)
        self._monitored = socket
        self._monitor = socket.get_monitor_socket(_EVENTS)

    def watch(self, poller: zmq.Poller) -> None:
        """Let ``poller`` wake where there is something to attend to."""
        poller.register(self._asked, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)

    def attend(self) -> None:
        """Answer who asks, and count what became of handshakes; never waits."""
        for _ in range(_PER_TURN):
            if not _has_something(self._asked):
                break
            self._answer(self._asked.recv_multipart(zmq.NOBLOCK))
        for _ in range(_PER_TURN):
            if not _has_something(self._monitor):
                break
            self._count(recv_monitor_message(self._monitor, zmq.NOBLOCK))

    def _answer(self, question: list[bytes]) -> None:
        """Say whether a key is known: version, request, domain, address, identity, mechanism, credential."""
        version, request = [*question, b"", b""][:2]
        is_known = False
        if len(question) == _ZAP_PARTS and question[5] == b"CURVE":
            is_known = z85.encode(question[6]).decode("ascii") in self._allowed
        if not is_known:
            address = question[3].decode("ascii", "replace") if len(question) > 3 else "?"
            self._refused("refused_unknown_key", f"a trainer at {address} has a key that is not among {CLIENTS_TEXT}")
        code, text = (b"200", b"OK") if is_known else (b"400", b"this key is not known here")
        self._asked.send_multipart([version, request, code, text, b"", b""])

    def _count(self, event: Mapping[str, object]) -> None:
        if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._counts["authenticated"] += 1
        elif event["event"] == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and event["value"] != _MECHANISM_MISMATCH:
            self._refused("refused_wrong_server_key", "a trainer expects another worker's key (server.public)")
        elif event["event"] != zmq.EVENT_HANDSHAKE_FAILED_AUTH:  # which is counted where the key is looked up
            self._refused("refused_without_key", "something connects without a key (no SIDESTEP_KEYS there)")

    def _refused(self, name: str, text: str) -> None:
        if not self._counts[name]:
            _LOG.warning("a connection is refused: %s. Further ones are counted as %s", text, name)
        self._counts[name] += 1

    def statistics(self) -> Mapping[str, int]:
        """Return exact counts since the start."""
        return dict(self._counts)

    def close(self) -> None:
        """Close what was opened; the secured socket stays its owner's."""
        self._monitored.disable_monitor()
        self._monitor.close(0)
        self._asked.close(0)


CLIENTS_TEXT: Final = "this worker's clients/*.public"


def _has_something(socket: _Socket) -> bool:
    return bool(cast("int", socket.get(zmq.EVENTS)) & zmq.POLLIN)
