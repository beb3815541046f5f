from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.protocol.endpoints import Endpoint
from sidestep.worker.errors import EndpointBusyError, ListenError
from sidestep.worker.intake.feed import Feed
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.listening import EndpointLock, private_folder
from sidestep.worker.intake.receiver import Receiver
from sidestep.worker.intake.reception import Reception


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's path."""
    folder = Path(tempfile.mkdtemp(prefix="ss-"))
    yield folder
    shutil.rmtree(folder)


def ipc(path: Path) -> Endpoint:
    return Endpoint.parse(f"ipc://{path}")


def test_the_socket_folder_is_made_private(short: Path) -> None:
    EndpointLock(ipc(short / "made" / "s")).release()
    assert stat.S_IMODE((short / "made").stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o770, 0o707])
def test_a_folder_that_others_may_enter_is_refused(short: Path, mode: int) -> None:
    short.chmod(mode)
    with pytest.raises(ListenError, match="others may enter"):
        EndpointLock(ipc(short / "s"))


def test_a_link_is_no_private_folder(short: Path) -> None:
    (short / "real").mkdir(mode=0o700)
    (short / "link").symlink_to(short / "real")
    with pytest.raises(ListenError, match="not a folder of this user"):
        private_folder(short / "link")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(short: Path) -> None:
    (short / "theirs").mkdir(mode=0o700)
    os.chown(short / "theirs", 12_345, 12_345)
    with pytest.raises(ListenError, match="not a folder of this user"):
        private_folder(short / "theirs")


def test_a_folder_that_others_could_replace_is_refused(short: Path) -> None:
    (short / "shared").mkdir()
    (short / "shared").chmod(0o777)
    with pytest.raises(ListenError, match="others may replace"):
        private_folder(short / "shared" / "own")
    (short / "shared").chmod(0o1777)  # as /tmp is: what is in it stays its owner's
    private_folder(short / "shared" / "own")


CONNECT_AS_ANOTHER = """
import os, socket, sys
os.setgroups([]); os.setgid(12345); os.setuid(12345)
with socket.socket(socket.AF_UNIX) as stranger:
    try:
        stranger.connect(sys.argv[1])
    except PermissionError:
        sys.exit(13)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_cannot_connect_even_where_the_folder_is_opened_later(short: Path) -> None:
    endpoint = ipc(short / "private" / "s")
    lock = EndpointLock(endpoint)
    journal = Journal(short / "journal")
    feed = Feed(journal.segments, limit_bytes=0, start_arrival=0)
    reception = Reception(journal, feed, instance="w", commit_interval_seconds=0.02, commit_messages=10)
    receiver = Receiver(endpoint, reception)
    short.chmod(0o755)
    umask = os.umask(0)
    try:
        receiver.start()
    finally:
        os.umask(umask)
    command = [sys.executable, "-c", CONNECT_AS_ANOTHER, str(short / "private" / "s")]
    try:
        assert stat.S_IMODE((short / "private" / "s").stat().st_mode) == 0o600
        assert subprocess.run(command, timeout=30, check=False).returncode == 13
        (short / "private").chmod(0o755)
        assert subprocess.run(command, timeout=30, check=False).returncode == 13
        (short / "private" / "s").chmod(0o666)
        assert subprocess.run(command, timeout=30, check=False).returncode == 0, "the test itself sees a difference"
    finally:
        receiver.stop(0.0)
        journal.close()
        lock.release()


def test_a_stale_socket_is_replaced_and_one_in_use_is_not(short: Path) -> None:
    endpoint = ipc(short / "s")
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(short / "s"))
    first = EndpointLock(endpoint)
    assert not (short / "s").exists()
    with socket.socket(socket.AF_UNIX) as serving:
        serving.bind(str(short / "s"))
        with pytest.raises(EndpointBusyError, match="another worker serves"):
            EndpointLock(endpoint)
        assert (short / "s").exists()
    first.release()
    EndpointLock(endpoint).release()


def test_a_file_that_is_no_socket_is_left_alone(short: Path) -> None:
    (short / "s").write_text("precious")
    with pytest.raises(ListenError, match="is no socket"):
        EndpointLock(ipc(short / "s"))
    assert (short / "s").read_text() == "precious"


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:7000", "tcp://*:7000", "tcp://192.0.2.7:7000", "tcp://host:7000"])
def test_other_hosts_are_not_listened_to_without_keys(address: str) -> None:
    with pytest.raises(ListenError, match="no key files"):
        EndpointLock(Endpoint.parse(address))


def test_a_loopback_port_has_one_worker(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDESTEP_RUNTIME", str(short / "runtime"))
    endpoint = Endpoint.parse("tcp://127.0.0.1:7123")
    first = EndpointLock(endpoint)
    with pytest.raises(EndpointBusyError):
        EndpointLock(endpoint)
    first.release()
