"""Whether a worker is well: ``/healthz`` and ``/metrics``, and ``worker.json`` beside the journal that says where.

Well means that what arrives is read and can be kept. A sink that lags is told, and is no illness (docs/delivery.md,
section 10). Both pages hold numbers, ids, states and paths: no text of a training.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from sidestep.worker.errors import WorkerError
from sidestep.worker.home import WORKER_FILE

_LOG: Final = logging.getLogger(__name__)
_ASK_TIMEOUT_SECONDS: Final = 5.0
_REQUEST_TIMEOUT_SECONDS: Final = 10.0
LOOPBACK: Final = "127.0.0.1"


class HealthServer:
    """Answers ``GET /healthz`` with JSON (200 where the worker is healthy, else 503), and ``GET /metrics``."""

    def __init__(self, report: Callable[[], Mapping[str, Any]], port: int = 0, host: str = LOOPBACK) -> None:
        """Listen; ``report`` is called on other threads and has a key ``healthy``.

        Raises:
            WorkerError: the address cannot be listened on.
        """

        class Answer(BaseHTTPRequestHandler):
            timeout = _REQUEST_TIMEOUT_SECONDS

            def do_GET(self) -> None:
                page = urlsplit(self.path).path
                if page == "/healthz":
                    said = report()
                    body = json.dumps(said, default=str).encode()
                    self._answer(200 if said.get("healthy") else 503, "application/json", body)
                elif page == "/metrics":
                    # Loaded by the worker that is scraped alone, and not by each look of a container's health check.
                    from sidestep.worker.prometheus import exposition  # noqa: PLC0415

                    body, content_type = exposition(report(), self.headers.get("Accept", ""))
                    self._answer(200, content_type, body)
                else:
                    self.send_error(404)

            def _answer(self, status: int, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class's name)
                """Say nothing: a look at the health is no event."""

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  (the base class's)
                """A caller that hangs up is no event of the worker; its console is not for that."""
                _LOG.debug("a look at the health failed", exc_info=True)

        try:
            self._server = Server((host, port), Answer)
        except OSError as error:
            raise WorkerError(
                f"health_host, health_port: {host}:{port} cannot be listened on: {error.strerror}"
            ) from error
        shown = _reachable(host)
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{self._server.server_port}/healthz"
        """Where this machine reaches it."""
        if not is_loopback(host):
            _LOG.warning("the health pages are open to whoever reaches port %d of this host", self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, name="sidestep-health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address; what is a name but ``localhost`` is not taken for it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reachable(host: str) -> str:
    """Return where a server that listens at ``host`` is reached from here."""
    return {"0.0.0.0": LOOPBACK, "::": "::1", "": LOOPBACK}.get(host, host)  # noqa: S104  (compared, not bound)


def write_end(journal: Path, *, exit_code: int, behind: Mapping[str, int]) -> None:
    """Say in the worker's file that it ended in order, and which runs W&B lacks how many entries of."""
    said = json.loads((journal / WORKER_FILE).read_text(encoding="utf-8"))
    _replace(journal, {**said, "ended_at": time.time(), "exit_code": exit_code, "behind": dict(behind)})


def write_worker_file(journal: Path, *, endpoint: str, health_url: str, instance: str, started_at: float) -> None:
    """Say where this worker is; replaced as a whole."""
    said = {
        "pid": os.getpid(),
        "endpoint": endpoint,
        "health_url": health_url,
        "instance": instance,
        "started_at": started_at,
    }
    _replace(journal, said)


def _replace(journal: Path, said: Mapping[str, Any]) -> None:
    fresh = journal / f".{WORKER_FILE}.{os.getpid()}"
    fresh.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    fresh.replace(journal / WORKER_FILE)


def ask_health(journal: Path) -> dict[str, Any]:
    """Return what the journal's worker says of itself; ``healthy`` is False, with a ``reason``, where none answers."""
    try:
        said = json.loads((journal / WORKER_FILE).read_text(encoding="utf-8"))
        address = urlsplit(said["health_url"])
    except FileNotFoundError:
        return {"healthy": False, "reason": f"no worker has opened {journal}"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"healthy": False, "reason": f"{journal / WORKER_FILE} cannot be read: {error!r}"}
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=_ASK_TIMEOUT_SECONDS)
    try:
        connection.request("GET", address.path)
        answer: Any = json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        return {**said, "healthy": False, "reason": f"the worker (pid {said.get('pid')}) does not answer: {error}"}
    finally:
        connection.close()
    if not isinstance(answer, dict) or answer.get("instance") != said.get("instance"):
        return {**said, "healthy": False, "reason": "another program answers at the worker's old address"}
    return answer
