"""Rows of docs/bad_input.md about the way to the worker: absent, of another version, something else, a full disk."""

from __future__ import annotations

import re
import resource
import socketserver
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol import frames
from sidestep.protocol.version import WIRE_MAJOR
from sidestep.trainer_hooks.conversation import Patience
from sidestep.trainer_hooks.publisher import Publisher

MakeTraining = Callable[..., Any]


class NoWorker(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(64)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" * 4)


@pytest.fixture
def web_server() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), NoWorker) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"tcp://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def impatient(address: str) -> Callable[..., Publisher]:
    """Return what makes a publisher that says soon that nobody answers: ten seconds otherwise."""

    def publisher(identity: Any, hello: Any, blobs: Any, staging: Any) -> Publisher:
        patience = Patience(warning_seconds=0.3)
        return Publisher(address, identity, hello, blobs=blobs, source=staging, patience=patience).start()

    return publisher


def test_worker_absent(make_training: MakeTraining, told: Any, tmp_path: Path) -> None:
    training = make_training()
    training.attach(transport=impatient(f"ipc://{tmp_path}/nobody"), settings={"close_timeout_seconds": 0.2})
    training.run(3)
    told.once("worker absent")
    training.hooks.close()
    told.once("worker absent to the end")
    assert training.hooks.failures() == {}


def test_what_listens_is_no_worker(make_training: MakeTraining, told: Any, web_server: str) -> None:
    training = make_training()
    training.attach(transport=impatient(web_server), settings={"close_timeout_seconds": 0.2})
    training.run(3)
    told.once("a locked endpoint")
    training.hooks.close()
    told.once("worker absent to the end")
    assert training.hooks.failures() == {}


def test_a_locked_endpoint(make_training: MakeTraining, told: Any) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.plain_server = True  # asks for a name and a password
        port = router.bind_to_random_port("tcp://127.0.0.1")
        training = make_training()
        training.attach(transport=impatient(f"tcp://127.0.0.1:{port}"), settings={"close_timeout_seconds": 0.2})
        training.run(3)
        told.once("a locked endpoint")
        assert training.hooks.failures() == {}


def test_protocol_of_another_version(
    make_training: MakeTraining, served: Any, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "WIRE_MAJOR", WIRE_MAJOR + 1)
    training = make_training()
    training.attach(endpoint=served.address)
    training.run(3)
    told.once("protocol of another version")
    training.run(2)
    training.hooks.close()
    assert told.text().count("\n") == 2, "that, and the families that are absent"
    assert served.entries(training.hooks) == []


def test_a_journal_that_cannot_be_opened(told: Any, tmp_path: Path) -> None:
    file = tmp_path / "a_file"
    file.write_text("no folder")
    worker = WorkerProcess()
    try:
        ended = subprocess.run(
            worker.command("worker", "--endpoint", worker.address, "--journal", str(file / "journal")),
            env=worker.environment, capture_output=True, text=True, timeout=40, check=False,
        )  # fmt: skip
    finally:
        worker.remove()
    assert ended.returncode == 1
    assert re.search(told.words("a journal that cannot be opened"), ended.stderr, re.MULTILINE), ended.stderr


def test_a_journal_that_cannot_be_written_any_more(make_training: MakeTraining, told: Any) -> None:
    worker = WorkerProcess()
    try:
        worker.start()
        training = make_training()
        training.attach(endpoint=worker.address)
        training.run(1)
        wait_until(worker.closed_steps, "the first step")
        assert worker.process is not None
        soft, hard = resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (1, hard))  # as good as a full disk
        training.run(3)
        told.once("a journal that cannot be written")
        resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        wait_until(lambda: len(worker.closed_steps()) == 4, "what was kept is stored", 40.0)
        assert training.hooks.failures() == {}
    finally:
        worker.remove()
