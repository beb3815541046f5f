"""A real worker whose journal breaks, grows over its budget, or loses its index: it goes on, and says what is gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.wire_trainer import WireTrainer, make_hello
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol.messages import Notice, Welcome
from sidestep.worker.health import ask_health

SMALL = ("--segment-bytes", "65536")
NUM_STEPS = 40

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[WorkerProcess]:
    made = WorkerProcess(*SMALL, *getattr(request, "param", ()))
    yield made
    made.remove()


def send_steps(trainer: WireTrainer, first: int, last: int) -> list[int]:
    """Send steps of some 6 KB each."""
    numbers = []
    for step in range(first, last):
        numbers.append(trainer.send(Notice(text="n" * 5_000 + str(step), code=f"n{step}", step=step)))
        numbers += trainer.send_step(step)
    return numbers


def send_acked(trainer: WireTrainer, first: int, last: int) -> list[int]:
    """Send steps, a few to a commit, so that there are many segments."""
    numbers: list[int] = []
    for step in range(first, last, 8):
        numbers += send_steps(trainer, step, min(last, step + 8))
        trainer.wait_for_acks(numbers)
    return numbers


def greet_again(trainer: WireTrainer) -> Welcome:
    trainer.say(make_hello())
    welcome = trainer.wait_for(Welcome)
    trainer.give(welcome.wanted)
    return welcome


def closed(worker: WorkerProcess) -> list[int]:
    return [step for _, step, _ in worker.closed_steps()]


def notices(worker: WorkerProcess, code: str) -> list[dict[str, Any]]:
    return [value for kind, value in worker.outbox() if kind == "notice" and value["code"] == code]


def rebuilt(out: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return [(line["kind"], line["payload"]) for line in lines]


def test_a_broken_segment_costs_no_step_that_had_closed_and_the_run_says_so(worker: WorkerProcess) -> None:
    worker.start()
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        send_acked(trainer, 0, NUM_STEPS)
        wait_until(lambda: len(closed(worker)) == NUM_STEPS, "all steps close")
        worker.kill()
        path = worker.journal / "segment-000001.sqlite"
        content = bytearray(path.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 9_000] = b"\xff" * 9_000
        path.write_bytes(content[: -3 * 4_096])
        worker.start()
        welcome = greet_again(trainer)
        assert welcome.committed.tolist() == [[1, trainer.sequence]]  # what steps used is not asked for again
        trainer.wait_for_acks(send_steps(trainer, NUM_STEPS, NUM_STEPS + 3))
        trainer.goodbye(NUM_STEPS + 2)
        wait_until(lambda: worker.query("SELECT * FROM ending"), "the run ends")
    assert closed(worker) == list(range(NUM_STEPS + 3))
    wait_until(lambda: notices(worker, "journal_damaged"), "the run says that its journal is damaged")
    (said,) = notices(worker, "journal_damaged")
    assert "segment 1 (segment-000001.sqlite is cut" in said["text"]
    assert "their rows are here, a replay lacks them; no step lacks anything" in said["text"]
    (damaged,) = ask_health(worker.journal)["journal_state"]["damaged"]
    assert damaged["file"] == "segment-000001.corrupt.sqlite"
    assert damaged["messages_used"] > 0
    assert damaged["messages_lost"] == 0
    assert "segment-000001.corrupt.sqlite" in worker.text()
    assert worker.terminate() == 0
    done = worker.run("replay", str(worker.journal), "--out", str(worker.folder / "again"))
    assert done.returncode == 1
    assert "NOT REBUILT, its messages are not all here" in done.stdout
    assert rebuilt(worker.folder / "again") == worker.outbox()


def test_what_an_open_step_had_in_a_broken_segment_is_lost_by_name_or_sent_again(worker: WorkerProcess) -> None:
    worker.start()
    with WireTrainer(worker.address) as trainer:
        trainer.greet(make_hello(world_size=2))
        numbers = send_acked(trainer, 0, NUM_STEPS)  # no step closes: the other rank has not come
        worker.kill()
        path = worker.journal / "segment-000001.sqlite"
        path.write_bytes(b"")
        worker.start()
        trainer.say(make_hello(world_size=2))
        welcome = trainer.wait_for(Welcome)
        assert welcome.committed[0, 0] > 1
        lost = set(numbers) - {n for first, last in welcome.committed.tolist() for n in range(first, last + 1)}
        assert lost
        assert f"rank 0: 1-{max(lost)})" in worker.text()
        trainer.acked.clear()
        trainer.acked.update(set(numbers) - lost)
        trainer.resend_unacked()  # as a publisher does that still holds them
        trainer.wait_for_acks(numbers)
        with WireTrainer(worker.address, rank=1) as other:
            other.greet(make_hello(world_size=2))
            other.wait_for_acks([number for step in range(NUM_STEPS) for number in other.send_step(step)])
        wait_until(lambda: len(closed(worker)) == NUM_STEPS, "all steps close")
    assert worker.closed_steps() == [(0, step, "complete") for step in range(NUM_STEPS)]


@pytest.mark.parametrize("worker", [("--journal-max-bytes", "600000")], indirect=True)
def test_old_segments_go_when_their_steps_are_closed_and_the_run_stays(worker: WorkerProcess) -> None:
    worker.start()
    num_steps = 160
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        send_acked(trainer, 0, num_steps)
        wait_until(lambda: len(closed(worker)) == num_steps, "all steps close")
        wait_until(lambda: not list(worker.journal.glob("segment-000001*")), "the oldest segment goes")
        before = worker.outbox()
        gone = ask_health(worker.journal)["journal_state"]["messages_deleted"]
        assert gone > 0
        worker.kill()
        worker.start()
        assert greet_again(trainer).committed.tolist() == [[1, trainer.sequence]]
        trainer.send_frames(trainer.sent[1])  # long deleted, and still known
        trainer.acked.clear()
        trainer.wait_for_acks([1])
        trainer.goodbye(num_steps - 1)
        wait_until(lambda: worker.query("SELECT * FROM ending"), "the run ends")
    assert closed(worker) == list(range(num_steps))
    assert worker.outbox()[: len(before)] == before
    assert worker.terminate() == 0
    done = worker.run("replay", str(worker.journal), "--out", str(worker.folder / "again"))
    assert done.returncode == 1
    assert "of its raw messages are not kept any more" in done.stdout
    assert rebuilt(worker.folder / "again") == worker.outbox()
    report = worker.run("report", str(worker.journal), "--out", str(worker.folder / "report.html"))
    assert report.returncode == 0, report.stderr


@pytest.mark.parametrize("worker", [("--assembly-deadline-seconds", "1")], indirect=True)
def test_a_broken_index_is_no_riddle_and_another_journal_takes_on_what_the_trainer_holds(worker: WorkerProcess) -> None:
    worker.start()
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        trainer.wait_for_acks(send_steps(trainer, 0, 3))
        wait_until(lambda: len(closed(worker)) == 3, "the steps close")
        worker.kill()
        for path in worker.journal.glob("index.sqlite*"):
            path.write_bytes(b"\xff" * path.stat().st_size)
        done = worker.run("worker", "--endpoint", worker.address, "--journal", str(worker.journal))
        assert done.returncode == 1
        assert f"the journal's index {worker.journal}/index.sqlite is damaged" in done.stderr
        assert f"move {worker.journal} away" in done.stderr
        assert "Traceback" not in done.stderr
        worker.journal.rename(worker.folder / "broken")
        trainer.connect()
        numbers = send_steps(trainer, 3, 6)
        worker.start()
        greet_again(trainer)
        trainer.resend_unacked()
        trainer.wait_for_acks(numbers)
        wait_until(lambda: closed(worker) == [3, 4, 5], "what the trainer held is in the new journal")  # by deadline
