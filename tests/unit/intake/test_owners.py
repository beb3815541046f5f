"""Whom a worker stays for: who joins is never lost, and an ending worker takes nobody on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.protocol.endpoints import Endpoint
from sidestep.worker.intake.listening import EndpointLock, owners_at
from sidestep.worker.intake.owners import Owners


@pytest.fixture
def somebody() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.kill()
    process.communicate()


def nobody() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_worker_stays_for_its_owner_and_for_who_joins(tmp_path: Path, somebody: int) -> None:
    owners = Owners(tmp_path / "o")
    assert not owners.join(os.getpid()), "nobody serves yet"
    owners.begin(nobody())
    assert not owners.any_alive()
    assert owners.join(somebody)
    assert owners.any_alive()
    assert not owners.close(), "somebody has joined"
    assert owners.close(at_once=True)
    assert not owners.join(os.getpid()), "it is ending"


def test_a_worker_that_ends_takes_nobody_on_and_the_next_one_does(tmp_path: Path, somebody: int) -> None:
    owners = Owners(tmp_path / "o")
    owners.begin(nobody())
    assert owners.close()
    assert not owners.join(somebody)
    owners.begin(somebody)
    assert owners.join(os.getpid())
    assert owners.any_alive()


def test_who_had_joined_a_worker_that_was_killed_is_stayed_for_by_the_next(tmp_path: Path, somebody: int) -> None:
    owners = Owners(tmp_path / "o")
    owners.begin(nobody())
    assert owners.join(somebody)
    owners.begin(0)
    assert owners.any_alive()


def test_a_number_that_another_process_has_been_given_is_no_owner(tmp_path: Path) -> None:
    owners = Owners(tmp_path / "o")
    owners.begin(0)
    (tmp_path / "o").write_text(f'{{"owners": [[{os.getpid()}, 1000.0]], "is_closed": false}}')
    assert not owners.any_alive()
    assert owners.join(os.getpid())
    assert owners.any_alive()


def test_a_torn_file_is_of_nobody(tmp_path: Path) -> None:
    (tmp_path / "o").write_text('{"owners": [[')
    owners = Owners(tmp_path / "o")
    assert not owners.any_alive()
    assert not owners.join(os.getpid())


def test_either_the_joining_or_the_ending_comes_first(tmp_path: Path) -> None:
    """Never both: a worker that has closed its list has told every one that came that it must wait."""
    for turn in range(20):
        path = tmp_path / str(turn)
        Owners(path).begin(0)
        answers: dict[str, bool] = {}
        threads = [
            threading.Thread(
                target=lambda path=path, answers=answers: answers.update(join=Owners(path).join(os.getpid()))
            ),
            threading.Thread(target=lambda path=path, answers=answers: answers.update(close=Owners(path).close())),
        ]
        for thread in threads[:: 1 if turn % 2 else -1]:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers["join"] is not answers["close"]


def test_the_lock_of_an_endpoint_knows_its_owners(tmp_path: Path, somebody: int) -> None:
    tmp_path.chmod(0o700)
    endpoint = Endpoint.parse(f"ipc://{tmp_path}/s")
    lock = EndpointLock(endpoint, owner_pid=nobody())
    assert not lock.has_owner()
    assert owners_at(endpoint).join(somebody)
    assert lock.has_owner()
    assert not lock.close_to_owners()
    assert lock.close_to_owners(at_once=True)
    lock.release()
