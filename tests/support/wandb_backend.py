"""A W&B backend on loopback that an unmodified SDK takes for the real one.

It answers the GraphQL operations, file streams and uploads of an online run and keeps what they say as plain values, so
that a test can assert on it: every history line with its offset, holes and changed lines counted. Faults are part of
its interface: the next n requests of a kind fail, or are answered late.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import socket
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self

ENTITY = "lab"
HISTORY, SUMMARY, OUTPUT = "wandb-history.jsonl", "wandb-summary.json", "output.log"
_CLOCK_KEY = "_runtime"  # of the process that logs, not of the row
_OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")
_STREAM_PATH = re.compile(r"/files/[^/]+/[^/]+/([^/]+)/file_stream")


@dataclass(kw_only=True)
class BackendRun:
    """One run as the server has it."""

    name: str
    project: str = ""
    entity: str = ENTITY
    display_name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, dict[int, str]] = field(default_factory=dict)
    """File to its lines, by number."""
    overwritten_lines: int = 0
    """History lines that were sent again with other values (the logging process's own clock left out)."""
    repeated_lines: int = 0
    """History lines that were sent again."""
    identical_lines: int = 0
    """Of those, the ones whose bytes were the same, the clock of the process that logged included."""
    relinked_tables: int = 0
    """Of those, the ones that name another upload of a table beside the same scalars."""
    posts_by_status: Counter[int] = field(default_factory=Counter)
    """Answers to the run's file stream."""
    holes: int = 0
    """History lines that were sent beyond the end of what was there."""
    alerts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    is_complete: bool = False

    @property
    def state(self) -> str:
        """What the run's page shows."""
        if not self.is_complete:
            return "running"
        return "finished" if self.exit_code == 0 else "failed"

    def lines(self, file: str) -> list[str]:
        """Return a stream's lines in the order of their numbers."""
        stored = self.streams.get(file, {})
        return [stored[number] for number in sorted(stored)]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The run's rows."""
        return [json.loads(line) for line in self.lines(HISTORY)]

    def store(self, file: str, offset: int, content: list[str]) -> None:
        """Store lines at their numbers."""
        stored = self.streams.setdefault(file, {})
        if file == SUMMARY:
            stored.clear()
        for number, line in enumerate(content, offset):
            if file == HISTORY:
                self._count(stored, number, line)
            stored[number] = line

    def _count(self, stored: Mapping[int, str], number: int, line: str) -> None:
        if number in stored:
            before, after = _values(stored[number]), _values(line)
            self.repeated_lines += 1
            self.identical_lines += stored[number] == line
            self.overwritten_lines += _without_tables(before) != _without_tables(after)
            self.relinked_tables += _without_tables(before) == _without_tables(after) and before != after
        elif number != len(stored):
            self.holes += 1


def _values(line: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key != _CLOCK_KEY}


def _without_tables(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the uploads of tables out: each has an address of its own, whoever logs the table."""
    return {key: "table" if table_path(value) else value for key, value in values.items()}


def table_path(value: object) -> str:
    """Return which upload a row's value names, empty where it is no table."""
    is_table = isinstance(value, dict) and value.get("_type") == "table-file"
    return str(value["artifact_path"]) if is_table and isinstance(value, dict) else ""


@dataclass(kw_only=True)
class Fault:
    """How requests of a kind go wrong."""

    status: int = 500
    """HTTP status; -1: the connection is dropped."""
    requests: int = -1
    """How many; -1: all."""
    until: threading.Event | None = None
    """Wait for this instead of failing, and then go on: what the sender meant long ago lands late."""


class WandbBackend:
    """The server; a context manager. ``environment`` is what the SDK must see to use it."""

    def __init__(self) -> None:
        self.runs: dict[str, BackendRun] = {}
        self.files: dict[str, bytes] = {}
        """Upload path to content."""
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.operations: Counter[str] = Counter()
        self.faults: dict[str, Fault] = {}
        """``filestream`` (of one run: ``filestream ID``), ``filestream_answer`` (stored, then failing), ``upload``,
        ``graphql``
    or an operation's name."""
        self.stopped_runs: set[str] = set()
        """Runs whose page says stop."""
        self.lock = threading.RLock()
        self._port = 0
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point an SDK here."""
        return {
            "WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false", "WANDB_MODE":
            "online",
        }  # fmt: skip

    def start(self) -> None:
        """Listen, on the port it had before where there was one: what is stored stays over an outage."""
        self._server = _Server(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def fault_of(self, kind: str) -> Fault | None:
        """Return what goes wrong with a request of this kind, and count it off."""
        with self.lock:
            fault = self.faults.get(kind)
            if fault is None or fault.requests == 0:
                return None
            fault.requests -= 1
            self.operations[f"fault {kind}"] += 1
            return fault

    def stream(self, run_id: str, post: Mapping[str, Any]) -> dict[str, Any]:
        """Take a post of a file stream."""
        with self.lock:
            run = self.runs.setdefault(run_id, BackendRun(name=run_id))
            for file, chunk in (post.get("files") or {}).items():
                run.store(file, chunk["offset"], chunk["content"])
            if post.get("complete"):
                run.is_complete, run.exit_code = True, post.get("exitcode")
            return {"stopped": run_id in self.stopped_runs}

    def has_table(self, path: str) -> bool:
        """Return whether the upload that a row names (``table_path``) is committed, its file included."""
        client_id, _, name = path.removeprefix("wandb-client-artifact://").partition("/")
        with self.lock:
            made = [key for key, artifact in self.artifacts.items() if artifact["client_id"] == client_id]
            return any(
                self.artifacts[key]["state"] == "COMMITTED" and f"/artifact/{key}/{name}" in self.files for key in made
            )

    def answer(self, operation: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL operation; one that is not known is an error, as it is at the real server."""
        with self.lock:
            self.operations[operation] += 1
            method = getattr(self, f"_{re.sub('(?<!^)(?=[A-Z])', '_', operation).lower()}", None)
            if method is None:
                return {"errors": [{"message": f"the loopback backend does not know {operation}"}]}
            return {"data": method(variables)}

    # ----------------------------------------------------------------------------------- operations, by their names

    def _viewer(self, _: Mapping[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": {"id": "u", "entity": ENTITY, "username": "me", "email": "", "flags": "{}", "teams": teams}}

    def _server_info(self, _: Mapping[str, Any]) -> dict[str, Any]:
        versions = {"max_cli_version": "99.0.0", "min_cli_version": "0.1.0"}
        return {"serverInfo": {"cliVersionInfo": versions, "latestLocalVersionInfo": None}}

    def _server_features_query(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _upsert_bucket(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or base64.b64decode(variables["id"]).decode()
        inserted = name not in self.runs
        run = self.runs.setdefault(name, BackendRun(name=name))
        run.entity = variables.get("entity") or run.entity
        run.project = variables.get("project") or run.project
        run.display_name = variables.get("displayName") or run.display_name
        run.tags = list(variables.get("tags") or run.tags)
        run.config = json.loads(variables["config"]) if variables.get("config") else run.config
        bucket = {
            **_bucket(run), "displayName": run.display_name or name, "description": "", "sweepName": None,
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}},
        }  # fmt: skip
        return {"upsertBucket": {"inserted": inserted, "bucket": bucket}}

    def _run_resume_status(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        model = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": ENTITY}}
        if run is None:
            return {"model": {**model, "bucket": None}}
        run.is_complete = False  # asked for when it is opened again
        bucket = {
            **_bucket(run), "displayName": run.display_name, "summaryMetrics": (run.lines(SUMMARY) or ["{}"])[-1],
            "logLineCount": len(run.lines(OUTPUT)), "eventsLineCount": 0, "eventsTail": "[]", "tags": run.tags,
            "historyTail": json.dumps(run.lines(HISTORY)[-1:]), "notes": None, "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        return {"model": {**model, "bucket": bucket}}

    def _run(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"project": {"run": None}}
        return {"project": {"run": {**_bucket(run), "projectId": "1", "state": run.state}}}

    def _run_stopped_status(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": variables["runId"] in self.stopped_runs}}}

    def _notify_scriptable_run_alert(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        self.runs[variables["runName"]].alerts.append(dict(variables))
        return {"notifyScriptableRunAlert": {"success": True}}

    def _create_run_files(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        place = f"{self.url}/up/{variables['run']}"
        files = [{"name": name, "uploadUrl": f"{place}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _mark_run_files_uploaded(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def _create_artifact(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        given, made = variables["input"], f"artifact{len(self.artifacts)}"
        self.artifacts[made] = {"digest": given.get("digest"), "run": given.get("runName"), "state": "PENDING",
                                "client_id": given.get("clientID")}  # fmt: skip
        artifact = {"id": made, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _create_artifact_manifest(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": self._manifest(variables["artifactID"])}

    def _update_artifact_manifest(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": self._manifest(variables["artifactManifestID"])}

    def _manifest(self, artifact: str) -> dict[str, Any]:
        file = {"id": "f", "uploadUrl": f"{self.url}/manifest/{artifact}", "uploadHeaders": []}
        return {"artifactManifest": {"id": artifact, "file": file}}

    def _create_artifact_files(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        edges: list[dict[str, Any]] = []
        for spec in (variables.get("input") or variables)["artifactFiles"]:
            artifact, name = spec["artifactID"], spec["name"]
            edges.append({"node": {
                "storagePath": f"{artifact}/{name}", "uploadUrl": f"{self.url}/artifact/{artifact}/{name}",
                "uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": artifact},
            }})  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _artifact_type(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _commit_artifact(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        made = (variables.get("input") or variables)["artifactID"]
        self.artifacts[made]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": made, "digest": self.artifacts[made]["digest"]}}}


def _bucket(run: BackendRun) -> dict[str, Any]:
    return {
        "id": base64.b64encode(run.name.encode()).decode(),
        "name": run.name,
        "config": json.dumps(run.config),
        "historyLineCount": len(run.lines(HISTORY)),
    }


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], backend: WandbBackend) -> None:
        super().__init__(address, _Connection)
        self.backend = backend
        self._connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Remember the connection, to cut it at an outage."""
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def server_close(self) -> None:
        """Cut every connection: a server that is away does not go on with those it had."""
        super().server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent: a client that is killed resets its connections, which is what the tests are about."""


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    _late = False
    json_type: ClassVar = "application/json"

    def handle_one_request(self) -> None:
        """Answer; a connection that is cut meanwhile is an outage, not an error."""
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Stay silent."""

    def do_POST(self) -> None:
        backend, body, self._late = self.server.backend, self._body(), False
        if self.path.split("?")[0] == "/graphql":
            query = json.loads(body)
            match = _OPERATION.search(query["query"])
            operation = match[1] if match else "unnamed"
            if not (self._fails("graphql") or self._fails(operation)):
                self._reply(backend.answer(operation, query.get("variables") or {}))
        elif match := _STREAM_PATH.match(self.path):
            if self._fails("filestream", match[1]) or self._fails(f"filestream {match[1]}", match[1]):
                return
            answer = backend.stream(match[1], json.loads(body))
            backend.operations["stored late"] += self._late
            if not self._fails("filestream_answer"):
                self._reply(answer)
        else:
            self._reply({})

    def do_PUT(self) -> None:
        body = self._body()
        if not self._fails("upload"):
            with self.server.backend.lock:
                self.server.backend.files[self.path.split("?")[0]] = body
            self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def _fails(self, kind: str, run_id: str = "") -> bool:
        fault = self.server.backend.fault_of(kind)
        if fault is None:
            return False
        if run_id and fault.until is None and run_id in self.server.backend.runs:
            self.server.backend.runs[run_id].posts_by_status[fault.status] += 1
        if fault.until is not None:
            fault.until.wait()
            self._late = True
            return False
        if fault.status < 0:
            self.close_connection = True
            self.connection.close()
        else:
            self._reply({"error": "injected"}, fault.status)
        return True

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, answer: Mapping[str, Any], status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", self.json_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
