from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.wire_trainer import make_hello

from sidestep.protocol.frames import Envelope, encode
from sidestep.worker.intake.decisions import Incarnation
from sidestep.worker.intake.index import Index
from sidestep.worker.trainers import ELSEWHERE_FACTOR, Trainers, is_alive, started_at

SILENCE_SECONDS = 10.0


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def index_with(folder: Path, *topologies: dict[str, Any]) -> tuple[Index, Incarnation]:
    index = Index(folder / "index.sqlite")
    made = Incarnation(incarnation="inc", run_id="run", attempt=-1, first_seen=time.time(), world_size=1, start_step=0)
    for rank, topology in enumerate(topologies):
        envelope = Envelope(run_id="run", incarnation="inc", rank=rank)
        index.add_hello(made, rank, 0.0, encode(envelope, make_hello(topology=topology)))
    return index, made


def lost_after(index: Index, made: Incarnation, seconds: float, *, at_once: bool = False) -> bool:
    return bool(Trainers(index, SILENCE_SECONDS).lost([made], {"inc": 100.0}, 100.0 + seconds, at_once=at_once))


def test_a_process_that_ended_unwaited_is_not_alive() -> None:
    assert is_alive(os.getpid())
    assert not is_alive(ended_pid())
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert zombie.stdout is not None
    with zombie.stdout:
        zombie.stdout.read()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(zombie.pid)
    zombie.wait()


def test_a_silent_trainer_whose_process_lives_is_not_lost(tmp_path: Path) -> None:
    index, made = index_with(tmp_path, {"host": socket.gethostname(), "pid": os.getppid()})
    assert not lost_after(index, made, 10_000 * SILENCE_SECONDS)
    index.close()


def test_a_trainer_whose_process_is_gone_is_lost_once_it_is_silent(tmp_path: Path) -> None:
    index, made = index_with(tmp_path, {"host": socket.gethostname(), "pid": ended_pid()})
    assert not lost_after(index, made, SILENCE_SECONDS - 1)
    assert lost_after(index, made, SILENCE_SECONDS)
    assert lost_after(index, made, 0.0, at_once=True)
    index.close()


def test_a_worker_that_stood_still_listens_again_before_it_gives_a_trainer_up(tmp_path: Path) -> None:
    """What came while it stood still is in its sockets."""
    index, made = index_with(tmp_path, {"host": socket.gethostname(), "pid": ended_pid()})
    trainers, heard = Trainers(index, SILENCE_SECONDS), {"inc": 100.0}
    assert not trainers.lost([made], heard, 101.0)
    went_on_at = 101.0 + 10 * SILENCE_SECONDS
    listened = [turn / 10 for turn in range(100)]
    lost = [bool(trainers.lost([made], heard, went_on_at + seconds)) for seconds in listened]
    assert listened[lost.index(True)] == pytest.approx(SILENCE_SECONDS - 1.0, abs=0.5), "the second before counts"
    assert trainers.lost([made], heard, went_on_at, at_once=True)
    index.close()


def test_a_worker_that_is_always_slow_gives_a_trainer_up_too(tmp_path: Path) -> None:
    index, made = index_with(tmp_path, {"host": socket.gethostname(), "pid": ended_pid()})
    trainers = Trainers(index, SILENCE_SECONDS)
    assert any(trainers.lost([made], {"inc": 100.0}, 100.0 + 3.0 * turn) for turn in range(60))
    index.close()


def test_a_number_that_another_process_has_now_is_not_the_trainer(tmp_path: Path) -> None:
    index, made = index_with(tmp_path, {"host": socket.gethostname(), "pid": os.getppid()})
    began = started_at(os.getppid())
    assert began is not None
    assert 0 <= time.time() - began < 366 * 86_400
    assert lost_after(index, replace(made, first_seen=began - 60.0), SILENCE_SECONDS), "it began after the Hello"
    assert not lost_after(index, replace(made, first_seen=began + 60.0), 10_000 * SILENCE_SECONDS)
    index.close()


def test_the_workers_own_number_is_that_of_a_trainer_in_another_container(tmp_path: Path) -> None:
    index, made = index_with(tmp_path, {"host": socket.gethostname(), "pid": os.getpid()})
    assert not lost_after(index, made, SILENCE_SECONDS)
    assert lost_after(index, made, ELSEWHERE_FACTOR * SILENCE_SECONDS)
    index.close()


def test_one_living_rank_keeps_the_trainer(tmp_path: Path) -> None:
    here = socket.gethostname()
    index, made = index_with(tmp_path, {"host": here, "pid": ended_pid()}, {"host": here, "pid": os.getppid()})
    assert not lost_after(index, made, 2 * SILENCE_SECONDS)
    index.close()


def test_a_trainer_elsewhere_is_given_more_time(tmp_path: Path) -> None:
    index, made = index_with(tmp_path, {"host": "another.example", "pid": 1})
    assert not lost_after(index, made, ELSEWHERE_FACTOR * SILENCE_SECONDS - 1)
    assert not lost_after(index, made, 0.0, at_once=True)
    assert lost_after(index, made, ELSEWHERE_FACTOR * SILENCE_SECONDS)
    index.close()
