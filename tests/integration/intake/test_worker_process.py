"""A worker as its own process, with real sockets and a real journal: killed, started again, asked and ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from tests.support.wire_trainer import WireTrainer, make_hello
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol.messages import Ack, Notice, Welcome


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess()
    yield made
    made.remove()


def learning_rates(worker: WorkerProcess) -> list[tuple[int, int]]:
    """Return (attempt, step) of the rows that hold a rate: each step has exactly one."""
    rows = [value for kind, value in worker.outbox() if kind == "row"]
    return [(row["train/attempt"], row["train/step"]) for row in rows if "lr/vision_encoder" in row]


def test_killed_between_commits_every_acked_message_is_there_once_and_every_step_too(worker: WorkerProcess) -> None:
    worker.start()
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        for step in range(30):
            numbers = trainer.send_step(step)
            if step % 10 == 4:
                trainer.wait_for_acks(numbers)
            if step % 10 == 6:
                worker.kill()  # while the step before is on its way, or in a group that waits for its commit
                worker.start()
                trainer.say(make_hello())
                welcome = trainer.wait_for(Welcome)
                trainer.give(welcome.wanted)
                trainer.resend_unacked()
        trainer.goodbye(29)
        trainer.wait_for_acks(range(1, trainer.sequence + 1))
    wait_until(lambda: worker.query("SELECT * FROM ending"), "the run ends")
    stored = worker.query("SELECT sequence FROM message ORDER BY sequence", "segment-000001.sqlite")
    assert [sequence for (sequence,) in stored] == list(range(1, trainer.sequence + 1))
    assert worker.closed_steps() == [(0, step, "complete") for step in range(30)]
    assert learning_rates(worker) == [(0, step) for step in range(30)]
    numbers = [number for (number,) in worker.query("SELECT row_number FROM outbox WHERE row_number IS NOT NULL")]
    assert sorted(numbers) == list(range(len(numbers)))
    assert Counter(kind for kind, _ in worker.outbox())["run"] == 1


def test_a_restart_finishes_steps_that_were_journaled_but_not_closed(worker: WorkerProcess) -> None:
    worker.start()
    with WireTrainer(worker.address) as trainer:
        trainer.greet(make_hello(world_size=2))
        trainer.wait_for_acks(trainer.send_step(0))
        worker.kill()
        assert worker.closed_steps() == []
        worker.start()
        with WireTrainer(worker.address, rank=1) as other:
            other.greet(make_hello(world_size=2))
            other.wait_for_acks(other.send_step(0))
        wait_until(worker.closed_steps, "the step closes")
        assert worker.closed_steps() == [(0, 0, "complete")]


def test_a_second_start_of_the_trainer_is_another_attempt(worker: WorkerProcess) -> None:
    worker.start()
    with WireTrainer(worker.address) as first:
        first.greet()
        for step in range(4):
            first.send_step(step)
        first.wait_for_acks(range(1, first.sequence + 1))
        wait_until(lambda: len(worker.closed_steps()) == 4, "the first attempt's steps close")
    with WireTrainer(worker.address, incarnation="inc-2") as second:
        second.greet(make_hello(start_step=2))
        for step in range(2, 5):
            second.send_step(step)
        second.goodbye(4)
        second.wait_for_acks(range(1, second.sequence + 1))
    wait_until(lambda: len(worker.query("SELECT * FROM ending")) == 2, "both attempts end")
    assert learning_rates(worker) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (1, 4)]
    ends = worker.query("SELECT attempt, exit_code, tail_unknown FROM ending ORDER BY closed_number")
    assert ends == [(0, 1, 1), (1, 0, 0)]


def test_a_trainer_that_vanishes_ends_its_run_as_failed_with_an_unknown_tail() -> None:
    worker = WorkerProcess("--trainer-silence-seconds", "0.5")
    try:
        worker.start()
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        place = {**make_hello().topology, "pid": gone.pid}
        with WireTrainer(worker.address) as trainer:
            trainer.greet(make_hello(topology=place))
            trainer.wait_for_acks(trainer.send_step(0))
        wait_until(lambda: worker.query("SELECT * FROM ending"), "the run ends")
        kind, value = worker.outbox()[-1]
        assert (kind, value["exit_code"]) == ("finish", 1)
        assert str(gone.pid) in value["reason"]
        assert "4 are here" in value["reason"]
        assert sum(value.get("sidecar/tail_unknown", 0) for kind, value in worker.outbox() if kind == "row") == 1
    finally:
        worker.remove()


def test_chunked_tables_and_messages_arrive_whole(worker: WorkerProcess) -> None:
    worker.start()
    with WireTrainer(worker.address) as trainer:
        trainer.say(make_hello(run_config={"long": "x" * 50_000}), chunk_bytes=10_000)
        assert not trainer.wait_for(Welcome).hello_known  # it answers the first chunk
        trainer.give(trainer.wait_for(Ack).wanted)
        number = trainer.send(Notice(text="n" * 1_500, step=0), chunk_bytes=200)
        trainer.wait_for_acks([number, *trainer.send_step(0)])
        wait_until(worker.closed_steps, "the step closes")
    (opening,) = [value for kind, value in worker.outbox() if kind == "run"]
    assert opening["config"]["long"] == "x" * 50_000
    assert any(value["text"] == "n" * 1_500 for kind, value in worker.outbox() if kind == "notice")


def test_one_worker_an_endpoint_and_one_a_journal(worker: WorkerProcess) -> None:
    worker.start()
    twice = worker.run("worker", "--endpoint", worker.address, "--journal", str(worker.folder / "other"))
    assert twice.returncode == 1
    assert "another worker serves" in twice.stderr
    assert not (worker.folder / "other").exists()
    same = worker.run("worker", "--endpoint", f"{worker.address}2", "--journal", str(worker.journal))
    assert same.returncode == 1
    assert "another worker has the journal" in same.stderr
    with WireTrainer(worker.address) as trainer:
        assert trainer.greet().hello_known


def test_status_is_healthy_while_the_worker_lives_and_not_after(worker: WorkerProcess) -> None:
    worker.start()
    assert worker.run("status").stdout.startswith("healthy")
    answer = worker.run("status", str(worker.out), "--json")
    assert answer.returncode == 0
    said = json.loads(answer.stdout)
    assert said["healthy"] is True
    assert said["endpoint"] == worker.address
    worker.kill()
    after = worker.run("status", "--json")
    assert after.returncode == 1
    assert json.loads(after.stdout)["healthy"] is False


def test_sigterm_commits_what_is_on_its_way_and_leaves_a_living_run_open(worker: WorkerProcess) -> None:
    worker.start()
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        for step in range(20):
            trainer.send_step(step)
        assert worker.terminate() == 0
        trainer.wait_for_acks(range(1, trainer.sequence + 1))
    assert [step for _, step, _ in worker.closed_steps()] == list(range(20))
    assert worker.query("SELECT * FROM ending") == []
    assert worker.query("PRAGMA integrity_check") == [("ok",)]


def test_until_idle_ends_once_the_run_has_ended() -> None:
    worker = WorkerProcess("--until-idle", "--idle-exit-seconds", "0.2")
    try:
        worker.start()
        with WireTrainer(worker.address) as trainer:
            trainer.greet()
            trainer.send_step(0)
            trainer.wait_for_acks([*range(1, 5), trainer.goodbye(0)])
        assert worker.process is not None
        assert worker.process.wait(30) == 0
        assert [kind for kind, _ in worker.outbox()][-1] == "finish"
    finally:
        worker.remove()


def test_a_worker_ends_with_its_owner_when_all_is_done() -> None:
    owner = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    worker = WorkerProcess("--owner-pid", str(owner.pid), "--idle-exit-seconds", "0.2")
    try:
        worker.start()
        assert worker.process is not None
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(1.0)
        owner.kill()
        owner.wait()
        assert worker.process.wait(30) == 0
    finally:
        owner.kill()
        owner.wait()
        if owner.stdin is not None:
            owner.stdin.close()
        worker.remove()
