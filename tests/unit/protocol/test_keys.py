"""Key files: what is read, who may read it, and what the errors say to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zmq

from sidestep.protocol.endpoints import Endpoint
from sidestep.protocol.errors import EndpointError, KeyFileError
from sidestep.protocol.keys import client_keys, client_keys_in, read_secret, server_keys
from sidestep.worker.errors import ConfigError
from sidestep.worker.keys import make_keys

ELSEWHERE = Endpoint.parse("tcp://10.0.0.3:5555")
LOOPBACK = Endpoint.parse("tcp://127.0.0.1:5555")
SOCKET = Endpoint.parse("ipc:///run/s")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {"SIDESTEP_KEYS": str(folder), **more}


def test_what_is_made_fits_together_and_is_the_owners_alone(folder: Path) -> None:
    server = server_keys(ELSEWHERE, folder)
    client = client_keys(ELSEWHERE, environment(folder))
    assert server is not None
    assert client is not None
    assert zmq.curve_public(server.secret_key.encode()).decode() == client.server_key
    assert client_keys_in(server.clients) == {zmq.curve_public(client.secret_key.encode()).decode()}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["client.public", "client.secret", "server.public", "server.secret"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (folder, folder / "clients")} == {0o700}


def test_a_secret_is_not_shown_by_accident(folder: Path) -> None:
    server, client = server_keys(ELSEWHERE, folder), client_keys(ELSEWHERE, environment(folder))
    assert server is not None
    assert client is not None
    assert server.secret_key not in repr(server)
    assert client.secret_key not in repr(client)


def test_keys_are_never_replaced(folder: Path) -> None:
    before = (folder / "server.secret").read_bytes()
    with pytest.raises(ConfigError, match="is there already and is kept"):
        make_keys(folder)
    assert (folder / "server.secret").read_bytes() == before


def test_keys_are_not_made_where_others_look(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        make_keys(tmp_path / "open")
    assert not list((tmp_path / "open").iterdir())


def test_off_loopback_there_have_to_be_keys(folder: Path) -> None:
    with pytest.raises(KeyFileError, match=r"reached from other hosts.*`sidestep keys DIR`.*SIDESTEP_KEYS"):
        server_keys(ELSEWHERE, None)
    with pytest.raises(EndpointError, match="`sidestep keys DIR`"):
        client_keys(ELSEWHERE, {})
    assert server_keys(LOOPBACK, None) is None
    assert client_keys(LOOPBACK, {}) is None
    assert server_keys(LOOPBACK, folder) is not None
    assert client_keys(LOOPBACK, environment(folder)) is not None
    assert server_keys(SOCKET, folder) is None, "a private socket needs none"
    assert client_keys(SOCKET, environment(folder / "nowhere")) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_secret_that_others_may_read_is_refused(folder: Path, mode: int) -> None:
    (folder / "client.secret").chmod(mode)
    if os.geteuid() == 0 and mode == 0o640:
        read_secret(folder / "client.secret")  # as secrets are mounted into a container: root's, for its group
        (folder / "client.secret").chmod(0o660)
    with pytest.raises(KeyFileError, match=r"others may read .*client\.secret .*chmod 600"):
        client_keys(ELSEWHERE, environment(folder))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_secret_of_another_user_is_refused(folder: Path) -> None:
    os.chown(folder / "server.secret", 12_345, 12_345)
    with pytest.raises(KeyFileError, match="belongs to user 12345"):
        server_keys(ELSEWHERE, folder)


def test_a_link_to_a_secret_is_followed_to_the_file_that_counts(folder: Path) -> None:
    (folder / "client.secret").rename(folder / "real")
    (folder / "client.secret").symlink_to(folder / "real")  # as Kubernetes mounts secrets
    assert client_keys(ELSEWHERE, environment(folder)) is not None
    (folder / "real").chmod(0o644)
    with pytest.raises(KeyFileError, match="others may read"):
        client_keys(ELSEWHERE, environment(folder))


@pytest.mark.parametrize("name", ["server.secret", "clients/client.public"])
@pytest.mark.parametrize(
    "content",
    [b"", b"# only words\n", b"short\n", b"%%%%%" * 8, b"a" * 39 + b" \n", b"\xff" * 40, b"a" * 40 + b"\n" + b"b" * 40],
)
def test_what_is_no_key_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(KeyFileError, match=Path(name).name.replace(".", r"\.")):
        server_keys(ELSEWHERE, folder)


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / "server.secret").unlink()
    with pytest.raises(KeyFileError, match=r"server\.secret is missing; `sidestep keys`"):
        server_keys(ELSEWHERE, folder)
    (folder / "client.secret").unlink()
    with pytest.raises(KeyFileError, match=r"client\.secret is missing"):
        client_keys(ELSEWHERE, environment(folder))


def test_a_worker_that_lets_nobody_in_is_a_mistake(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    (tmp_path / "keys" / "clients" / "client.public").unlink()
    with pytest.raises(KeyFileError, match="no trainer could connect"):
        server_keys(ELSEWHERE, tmp_path / "keys")


def test_a_folder_that_others_could_add_keys_to_is_refused(folder: Path) -> None:
    (folder / "clients").chmod(0o777)
    with pytest.raises(KeyFileError, match="others may add keys"):
        server_keys(ELSEWHERE, folder)


def test_the_servers_key_is_the_files_then_the_variables_then_what_was_told(folder: Path) -> None:
    of_file = (folder / "server.public").read_text().splitlines()[-1]
    of_variable, told = (zmq.curve_keypair()[0].decode() for _ in range(2))
    named = environment(folder, SIDESTEP_SERVER_KEY=of_variable)

    def key(given: dict[str, str], told: str = "") -> str:
        keys = client_keys(ELSEWHERE, given, told=told)
        assert keys is not None
        return keys.server_key

    assert key(named, told) == of_file
    (folder / "server.public").unlink()
    assert key(named, told) == of_variable
    assert key(environment(folder), told) == told
    with pytest.raises(KeyFileError, match=r"server\.public is missing.*SIDESTEP_SERVER_KEY"):
        key(environment(folder))
    with pytest.raises(KeyFileError, match="SIDESTEP_SERVER_KEY does not hold one key"):
        key(environment(folder, SIDESTEP_SERVER_KEY="nonsense"))
