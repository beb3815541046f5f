"""The journal's disk runs full under a real worker and is freed: the training is not concerned, nothing goes unsaid.

The disk is a small file system of its own. What arrives while it is full is not acked; so the trainer keeps it, says so
once, and it is stored when there is room. What does not fit into the trainer's window is dropped there and counted.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support.faults_scene import FaultsTraining, closed_steps
from tests.support.small_disk import SmallDisk
from tests.support.wire_trainer import CONTENTS, WireTrainer, make_hello
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.messages import LearningRates, NoAck, Notice, Scalars, StepEnd, Welcome
from sidestep.trainer_hooks.publisher import Publisher
from sidestep.worker.errors import JournalWriteError
from sidestep.worker.health import ask_health
from sidestep.worker.intake.decisions import Closure, Incarnation
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.reserve import RESERVE_BYTES, RESERVE_FILE
from sidestep.worker.intake.segments import Row
from sidestep.worker.outbox import entry
from sidestep.worker.records import StepClosing

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "disk", 112)
    yield made
    made.unmount()


@pytest.fixture
def worker(disk: SmallDisk) -> Iterator[WorkerProcess]:
    journal = disk.folder / "journal"
    made = WorkerProcess("--journal", str(journal))
    made.journal = journal
    yield made
    made.remove()


def is_full(worker: WorkerProcess) -> bool:
    said = ask_health(worker.journal)
    return not said["healthy"] and "is full; messages are stored again when 72 MiB are free" in said["reason"]


def stored(worker: WorkerProcess) -> list[int]:
    return [number for (number,) in worker.query("SELECT sequence FROM message", "segment-000001.sqlite")]


def losses_without_hooks(folder: Path, num_steps: int) -> list[str]:
    (folder / "control").mkdir()
    control = FaultsTraining(folder / "control", "", "--steps", str(num_steps), "--step-seconds", "0")
    assert control.process.wait(40) == 0
    return [step["loss"] for step in control.steps()]


def test_a_training_does_not_notice_a_full_disk_and_all_of_it_arrives_when_there_is_room(
    tmp_path: Path, disk: SmallDisk, worker: WorkerProcess
) -> None:
    worker.start()
    reserve = worker.journal / RESERVE_FILE
    assert reserve.stat().st_size == RESERVE_BYTES
    training = FaultsTraining(tmp_path, worker.address)
    try:
        wait_until(lambda: len(closed_steps(worker)) >= 5, "the first steps close")
        disk.fill()
        wait_until(lambda: is_full(worker), "the worker says that the disk is full")
        assert not reserve.exists()
        disk.fill()  # the room that the reserve gave up is taken too: not even a state can be written
        training.wait_for_steps(60)
        before = len(closed_steps(worker))
        training.wait_for_steps(20)
        assert len(closed_steps(worker)) == before
        disk.free()
        wait_until(lambda: ask_health(worker.journal)["healthy"], "the worker is well again")
        assert reserve.stat().st_size == RESERVE_BYTES
        training.wait_for_steps(5)
        training.stop()
        num_steps = len(training.steps())
        wait_until(lambda: len(closed_steps(worker)) >= num_steps, "all steps close")
        assert closed_steps(worker) == dict.fromkeys(range(num_steps), "complete")
        assert num_steps >= 85
        assert "Traceback" not in training.said()
        assert [step["loss"] for step in training.steps()] == losses_without_hooks(tmp_path, num_steps)
        assert training.said().count("the worker cannot store what it gets") == 1
        numbers = sorted(stored(worker))
        assert numbers == list(range(1, len(numbers) + 1))
        assert worker.text().count("is full: nothing that arrives is stored until there is room") >= 1
        assert "has room again: what arrives is stored" in worker.text()
        assert worker.terminate() == 0
        assert not reserve.exists()  # nobody writes here any more: the room is given back
    finally:
        training.kill()


def test_states_are_written_from_the_reserve_while_messages_wait(disk: SmallDisk, worker: WorkerProcess) -> None:
    worker.start()
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        trainer.wait_for_acks(trainer.send_step(0))
        wait_until(lambda: closed_steps(worker) == {0: "complete"}, "the first step closes")
        disk.fill()
        numbers = trainer.send_step(1)
        refused = trainer.wait_for(NoAck)
        assert "disk of" in refused.reason
        assert "is full" in refused.reason
        assert not set(numbers) & trainer.acked
        before = worker.query("SELECT COUNT(*) FROM hello")
        with WireTrainer(worker.address, incarnation="inc-2", run_id="run-2") as other:
            other.greet()  # a Hello and its tables go into the index: there is room for these
        assert worker.query("SELECT COUNT(*) FROM hello") == [(before[0][0] + 1,)]
        disk.free()
        trainer.wait_for_acks(numbers)
        wait_until(lambda: len(closed_steps(worker)) >= 2, "the second step closes")


def test_a_worker_that_is_started_on_a_full_disk_listens_and_takes_all_when_there_is_room(
    disk: SmallDisk, worker: WorkerProcess
) -> None:
    worker.start()
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        trainer.wait_for_acks(trainer.send_step(0))
        worker.kill()
        disk.fill()
        worker.start()
        assert is_full(worker)
        trainer.say(make_hello())
        assert trainer.wait_for(Welcome).committed.tolist() == [[1, 4]]
        numbers = trainer.send_step(1)
        assert "is full" in trainer.wait_for(NoAck).reason
        disk.free()
        trainer.wait_for_acks(numbers)
        wait_until(lambda: list(closed_steps(worker)) == [0, 1], "both steps close")
    assert worker.terminate() == 0


def test_what_does_not_fit_into_the_window_meanwhile_is_counted_in_the_run(
    disk: SmallDisk, worker: WorkerProcess
) -> None:
    worker.start()
    identity = Envelope(run_id="run-1", incarnation="inc-1", rank=0)
    hello = make_hello(topology={"host": socket.gethostname(), "pid": os.getpid()})
    publisher = Publisher(worker.address, identity, hello, blobs=CONTENTS, window_bytes=200_000).start()
    try:
        send_step(publisher, 0)
        wait_until(lambda: closed_steps(worker).get(0) == "complete", "the first step closes")
        disk.fill()
        send_step(publisher, 1)
        wait_until(lambda: is_full(worker), "the worker says that the disk is full")
        for step in range(2, 400):
            send_step(publisher, step)
            time.sleep(0.002)
        wait_until(lambda: sum(a.dropped for a in publisher.accounts().values()) > 0, "the window overflows")
        disk.free()
        wait_until(lambda: ask_health(worker.journal)["healthy"], "the worker is well again")
        send_step(publisher, 400)
        wait_until(lambda: closed_steps(worker).get(400) == "complete", "the last step closes")
        accounts = publisher.accounts()
    finally:
        publisher.close(10.0)
    dropped = sum(account.dropped for account in accounts.values())
    assert dropped > 0
    in_run: dict[str, int] = {}
    for kind, row in worker.outbox():
        if kind == "row":
            in_run.update({name: value for name, value in row.items() if name.startswith("sidecar/dropped/")})
    assert sum(in_run.values()) == dropped, json.dumps(in_run)
    made = sum(account.produced for account in accounts.values())
    numbers = stored(worker)
    assert len(numbers) == len(set(numbers))
    assert made - dropped <= len(numbers) + 1  # the Goodbye, made after the accounts were looked at


def test_old_segments_make_room_on_a_full_disk_and_no_more_than_are_needed(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "disk", 12)
    try:
        journal = Journal(disk.folder / "journal", segment_bytes=1 << 20, reserve_bytes=2 << 20)
        made = Incarnation(incarnation="inc", run_id="run", attempt=-1, first_seen=1.0, world_size=1, start_step=0)
        journal.index.add_hello(made, 0, 1.0, b"hello")
        body = encode(Envelope(run_id="run", incarnation="inc", rank=0, sequence=1), Notice(text="y" * 100_000))

        def fill() -> None:
            for at in range(1_000):
                journal.segments.append([Row("inc", 0, at + 1, 13, -1, 1, 0, 1.5, at, body)])

        with pytest.raises(JournalWriteError, match=r"is full; messages are stored again when 2 MiB are free"):
            fill()
        arrival = journal.segments.next_arrival
        assert not (journal.folder / RESERVE_FILE).exists()
        journal.tidy()
        assert journal.statistics()["segments_deleted"] == 0  # their steps have not closed
        step = StepClosing(run_id="run", attempt=0, step=0, reason="complete", incarnation="inc", parts=((0, 1),))
        closure = Closure(closing=step, entries=(entry("run", {}),), pending_arrival=arrival, last_arrival=0)
        journal.index.write("run", [closure], b"state")  # there is room for a state
        again = Row("inc", 0, arrival + 1, 13, -1, 1, 0, 1.5, arrival, body)

        def is_stored() -> bool:
            journal.tidy()
            try:
                journal.segments.append([again])
            except JournalWriteError:
                return False
            return True

        wait_until(is_stored, "there is room again")
        assert 1 <= journal.statistics()["segments_deleted"] <= 4
        assert len(journal.segments.sealed()) >= 2
        assert (journal.folder / RESERVE_FILE).stat().st_size == 2 << 20
        assert journal.segments.committed("inc", 0).ranges().tolist() == [[1, arrival + 1]]
        journal.close()
        assert not (disk.folder / "journal" / RESERVE_FILE).exists()
    finally:
        disk.unmount()


def send_step(publisher: Publisher, step: int) -> None:
    publisher.submit(LearningRates(step=step, rates=np.array([0.1, 0.2], np.float64)))
    publisher.submit(Scalars(step=step, values={f"trainer/value-{n}": float(n) for n in range(100)}))
    publisher.submit(StepEnd(step=step, unix_time=1_700_000_000.0 + step, sent={"learning_rates": 1, "scalars": 1}))
