"""Whether a worker is well: ``/healthz`` on loopback, and ``worker.json`` beside the journal that says where.

Well means that what arrives is read and can be kept. A sink that lags is told, and is no illness (docs/delivery.md,
section 10).
"""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from sidestep.worker.errors import WorkerError
from sidestep.worker.home import WORKER_FILE

_ASK_TIMEOUT_SECONDS: Final = 5.0


class HealthServer:
    """Answers ``GET /healthz`` with JSON, 200 where the worker is healthy and 503 where not."""

    def __init__(self, report: Callable[[], Mapping[str, Any]], port: int = 0) -> None:
        """Listen on 127.0.0.1; ``report`` is called on another thread and has a key ``healthy``.

        Raises:
            WorkerError: the port is taken.
        """

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if urlsplit(self.path).path != "/healthz":
                    self.send_error(404)
                    return
                said = report()
                body = json.dumps(said, default=str).encode()
                self.send_response(200 if said.get("healthy") else 503)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class's name)
                """Say nothing: a look at the health is no event."""

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Answer)
        except OSError as error:
            raise WorkerError(f"health_port: {port} cannot be listened on: {error.strerror}") from error
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/healthz"
        self._thread = threading.Thread(target=self._server.serve_forever, name="sidestep-health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def write_worker_file(journal: Path, *, endpoint: str, health_url: str, instance: str, started_at: float) -> None:
    """Say where this worker is; replaced as a whole."""
    said = {
        "pid": os.getpid(),
        "endpoint": endpoint,
        "health_url": health_url,
        "instance": instance,
        "started_at": started_at,
    }
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
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        return {**said, "healthy": False, "reason": f"the worker (pid {said.get('pid')}) does not answer: {error}"}
    finally:
        connection.close()
    if answer.get("instance") != said.get("instance"):
        return {**said, "healthy": False, "reason": "another program answers at the worker's old address"}
    return answer
