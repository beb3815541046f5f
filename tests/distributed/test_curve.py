"""A worker with keys and real publishers: who is let in, who is not, and what both sides say about it."""

from __future__ import annotations

import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
from tests.support.rank_processes import free_port
from tests.support.wire_trainer import CONTENTS, make_hello, step_messages
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol.endpoints import Endpoint
from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.keys import ClientKeys, client_keys
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.conversation import Patience
from sidestep.trainer_hooks.publisher import Publisher
from sidestep.worker.health import ask_health
from sidestep.worker.keys import make_keys

PLAIN_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
HELLO = encode(Envelope(run_id="run-1", incarnation="inc-9", rank=0), make_hello())


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def worker(keys: Path) -> Iterator[WorkerProcess]:
    made = WorkerProcess("--keys", str(keys))
    made.address = f"tcp://127.0.0.1:{free_port()}"
    made.start()
    yield made
    made.remove()


class Trainer:
    """A publisher and what it says."""

    def __init__(self, address: str, keys: ClientKeys | None, *, warning_seconds: float = 600.0) -> None:
        self.lines: list[str] = []
        self.publisher = Publisher(
            address,
            Envelope(run_id="run-1", incarnation="inc-1", rank=0),
            make_hello(),
            blobs=CONTENTS,
            console=Console(self.lines.append),
            patience=Patience(warning_seconds=warning_seconds),
            keys=keys,
        ).start()

    def step(self, step: int) -> None:
        for message in step_messages(step):
            self.publisher.submit(message)

    def accepted(self) -> int:
        return sum(account.accepted for account in self.publisher.accounts().values())

    def in_window(self) -> int:
        return sum(account.in_window for account in self.publisher.accounts().values())


@pytest.fixture
def trainer() -> Iterator[Callable[..., Trainer]]:
    made: list[Trainer] = []

    def make(address: str, keys: ClientKeys | None, **settings: float) -> Trainer:
        made.append(Trainer(address, keys, **settings))
        return made[-1]

    yield make
    for each in made:
        each.publisher.close(0.1)


def read(folder: Path) -> ClientKeys:
    found = client_keys(Endpoint.parse("tcp://10.0.0.1:1"), {"SIDESTEP_KEYS": str(folder)})
    assert found is not None
    return found


@contextmanager
def knocking(address: str, first: bytes) -> Iterator[None]:
    """Connect, say ``first`` whatever is said there, and hang up after the block."""
    host, port = address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(first)
        yield


def received(worker: WorkerProcess) -> dict[str, Any]:
    figures: dict[str, Any] = ask_health(worker.journal)["receiver"]
    return figures


def test_a_trainer_with_the_right_keys_is_let_in(
    worker: WorkerProcess, keys: Path, trainer: Callable[..., Trainer]
) -> None:
    made = trainer(worker.address, read(keys))
    made.step(0)
    wait_until(lambda: made.accepted() >= len(step_messages(0)), "all is acked")
    assert made.lines == []
    figures = received(worker)
    assert figures["authenticated"] == 1
    assert not [name for name in figures if name.startswith("refused_")]


OTHER_KEYS: dict[str, tuple[str, str, Callable[[Path, Path], ClientKeys]]] = {
    "an unknown key": (
        "refused_unknown_key",
        "does not know this trainer's key",
        lambda mine, other: ClientKeys(secret_key=read(other).secret_key, server_key=read(mine).server_key),
    ),
    "another server's key": (
        "refused_wrong_server_key",
        "breaks off the handshake",
        lambda mine, other: ClientKeys(secret_key=read(mine).secret_key, server_key=read(other).server_key),
    ),
}


def assert_refused(worker: WorkerProcess, made: Trainer, told: str, counter: str) -> None:
    assert told in made.lines[-1]
    assert "SIDESTEP_KEYS" in made.lines[-1]
    assert "Training goes on" in made.lines[-1]
    assert made.in_window() == len(step_messages(0)), "nothing is lost yet"
    figures = received(worker)
    assert (figures["frames"], figures.get("authenticated", 0), figures["peers"]) == (0, 0, 0)
    assert worker.query("SELECT COUNT(*) FROM incarnation") == [(0,)]
    assert [text for text in ask_health(worker.journal)["warnings"] if "somebody else tries this port" in text]
    assert f"counted as {counter}" in worker.text()


@pytest.mark.parametrize("which", OTHER_KEYS)
def test_who_has_other_keys_is_refused_counted_and_told_once_what_to_do(
    worker: WorkerProcess, keys: Path, tmp_path: Path, trainer: Callable[..., Trainer], which: str
) -> None:
    counter, told, pick = OTHER_KEYS[which]
    make_keys(tmp_path / "other")
    made = trainer(worker.address, pick(keys, tmp_path / "other"))
    made.step(0)
    wait_until(lambda: received(worker).get(counter, 0) >= 2, "it has tried again, by a socket made anew")
    wait_until(lambda: made.publisher.statistics().num_handshake_failures >= 2, "the publisher has seen it twice")
    assert len(made.lines) == 1, made.lines
    assert_refused(worker, made, told, counter)


def test_who_has_no_keys_is_refused_counted_and_told_once_what_to_do(
    worker: WorkerProcess, trainer: Callable[..., Trainer]
) -> None:
    """Either side may be the first to see that the other speaks otherwise: the worker then counts, or it does not."""
    made = trainer(worker.address, None, warning_seconds=3.0)
    made.step(0)
    wait_until(lambda: [line for line in made.lines if "handshake" in line], "it is told")
    wait_until(lambda: received(worker).get("refused_without_key", 0) >= 1, "it is counted")
    *before, _ = made.lines
    # Where it has tried too seldom by then, on a machine that is slow enough, it is said that nobody answers; but never
    # after that.
    assert ["no worker answers" in line for line in before] in ([], [True]), made.lines
    assert_refused(worker, made, "this trainer has no keys", "refused_without_key")


def test_a_key_that_is_added_while_the_worker_runs_lets_the_trainer_in(
    worker: WorkerProcess, keys: Path, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    make_keys(tmp_path / "other")
    late = ClientKeys(secret_key=read(tmp_path / "other").secret_key, server_key=read(keys).server_key)
    made = trainer(worker.address, late)
    made.step(0)
    wait_until(lambda: received(worker).get("refused_unknown_key", 0) >= 1, "it is refused")
    shutil.copy(tmp_path / "other" / "clients" / "client.public", keys / "clients" / "late.public")
    wait_until(lambda: made.accepted() >= len(step_messages(0)), "it is let in")
    (keys / "clients" / "late.public").unlink()
    again = trainer(worker.address, late)
    wait_until(lambda: again.publisher.statistics().num_handshake_failures >= 1, "and no other of this key any more")


def test_an_allow_list_that_others_may_write_lets_nobody_new_in(
    worker: WorkerProcess, keys: Path, trainer: Callable[..., Trainer]
) -> None:
    (keys / "clients").chmod(0o777)
    (keys / "clients" / "new.public").write_text((keys / "server.public").read_text())
    made = trainer(worker.address, read(keys))
    wait_until(lambda: received(worker).get("refused_unknown_key", 0) >= 1, "it is refused")
    assert "others may add keys" in worker.text()
    (keys / "clients").chmod(0o700)
    (keys / "clients" / "new.public").unlink()
    made.step(0)
    wait_until(lambda: made.accepted() >= len(step_messages(0)), "it is let in")


def test_nothing_that_comes_before_the_handshake_is_decoded(worker: WorkerProcess, keys: Path) -> None:
    context = zmq.Context()
    with context, context.socket(zmq.DEALER) as plain:
        plain.linger = 0
        plain.connect(worker.address)
        plain.send(HELLO)
        for first in (PLAIN_GREETING, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64):
            with knocking(worker.address, first + b"\x04" + struct.pack(">H", len(HELLO)) + HELLO):
                pass
        wait_until(lambda: received(worker).get("refused_without_key", 0) >= 2, "they are counted")
    assert received(worker)["frames"] == 0
    assert worker.query("SELECT COUNT(*) FROM incarnation") == [(0,)]


def test_a_trainer_with_keys_says_that_a_worker_has_none(keys: Path, trainer: Callable[..., Trainer]) -> None:
    open_worker = WorkerProcess()
    open_worker.address = f"tcp://127.0.0.1:{free_port()}"
    open_worker.start()
    try:
        made = trainer(open_worker.address, read(keys))
        wait_until(lambda: made.lines, "it is told")
        assert "does not hold the key that this trainer expects, or none" in made.lines[0]
    finally:
        open_worker.remove()


def test_off_loopback_no_publisher_speaks_without_keys() -> None:
    with pytest.raises(ValueError, match="`sidestep keys DIR`"):
        Publisher("tcp://10.0.0.3:5555", Envelope(run_id="r", incarnation="i", rank=0), make_hello())


def test_run_tells_its_command_where_the_worker_is_and_which_keys_it_takes(keys: Path, tmp_path: Path) -> None:
    made = WorkerProcess()
    port = free_port()
    ask = "import os; print(*(os.environ[name] for name in ('SIDESTEP_ENDPOINT', 'SIDESTEP_KEYS', 'SIDESTEP_RUN_ID')))"
    options = ["--endpoint", f"tcp://0.0.0.0:{port}", "--keys", str(keys), "--out", str(tmp_path / "out")]
    try:
        done = made.run("run", *options, "--wandb-mode", "disabled", "--", sys.executable, "-c", ask)
        assert done.returncode == 0, done.stderr
        endpoint, folder, run_id = done.stdout.splitlines()[0].split()
        assert endpoint == f"tcp://{socket.gethostname()}:{port}", "an address that ranks of other hosts can be given"
        assert folder == str(keys)
        assert run_id
        any_port = made.run("run", "--endpoint", "tcp://127.0.0.1:*", "--out", str(tmp_path / "o"), "--", "true")
        assert any_port.returncode == 2
        assert "any free port" in any_port.stderr
    finally:
        made.remove()


def test_prometheus_counts_the_refused(worker: WorkerProcess) -> None:
    from urllib.request import urlopen  # noqa: PLC0415

    with knocking(worker.address, PLAIN_GREETING):
        wait_until(lambda: received(worker).get("refused_without_key", 0) >= 1, "it is counted")
    url = ask_health_url(worker)
    with urlopen(url, timeout=10) as page:  # noqa: S310  (our own loopback page)
        text = page.read().decode()
    assert 'sidestep_receiver_events_total{event="refused_without_key"}' in text


def ask_health_url(worker: WorkerProcess) -> str:
    import json  # noqa: PLC0415

    said = json.loads((worker.journal / "worker.json").read_text())
    return str(said["health_url"]).replace("/healthz", "/metrics")
