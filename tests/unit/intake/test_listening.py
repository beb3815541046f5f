from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.protocol.endpoints import Endpoint
from sidestep.worker.errors import EndpointBusyError, ListenError
from sidestep.worker.intake.listening import EndpointLock, private_folder


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
