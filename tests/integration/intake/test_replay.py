"""A run is rebuilt from its journal alone, byte for byte; and what does not come out the same is told."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from tests.support.wire_trainer import WireTrainer, make_hello, step_messages
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol.messages import Notice
from sidestep.worker.intake.journal import Journal
from sidestep.worker.replay import Comparison, entries_of, replay


@pytest.fixture(scope="module")
def recorded() -> Iterator[WorkerProcess]:
    """A journal with two ranks, a late part, a deadline, a lost attempt, a second one, and another run beside it."""
    worker = WorkerProcess("--assembly-deadline-seconds", "0.7", "--segment-bytes", str(1 << 16))
    try:
        worker.start()
        with WireTrainer(worker.address) as first, WireTrainer(worker.address, rank=1) as other:
            for rank in (first, other):
                rank.greet(make_hello(world_size=2))
            for step in range(12):
                first.send_step(step)
                if step != 5:
                    other.send_step(step)
                if step == 5:
                    wait_until(lambda: (0, 5, "deadline") in worker.closed_steps(), "the deadline passes")
                    other.send_step(5)
            first.send(Notice(text="something to say", code="said", step=11))
            for rank in (first, other):
                rank.wait_for_acks(range(1, rank.sequence + 1))
            wait_until(lambda: len(worker.closed_steps()) == 12, "the first attempt's steps close")
        with WireTrainer(worker.address, incarnation="inc-2") as second:
            second.greet(make_hello(start_step=8))
            for step in range(8, 12):
                second.send_step(step)
            wait_until(lambda: (1, 11, "complete") in worker.closed_steps(), "the last step closes")
            second.send(step_messages(11, rate=0.5)[0])
            second.goodbye(11, exit_code=3)
            second.wait_for_acks(range(1, second.sequence + 1))
        with WireTrainer(worker.address, incarnation="inc-3", run_id="run-2") as third:
            third.greet()
            third.wait_for_acks([*third.send_step(0), third.goodbye(0)])
        wait_until(lambda: len(worker.query("SELECT * FROM ending")) == 3, "all end")
        assert worker.terminate() == 0
        yield worker
    finally:
        worker.remove()


def test_the_journal_holds_what_makes_a_replay_hard(recorded: WorkerProcess) -> None:
    reasons = {reason for _, _, reason in recorded.closed_steps()}
    assert reasons == {"complete", "deadline", "tail"}
    late = recorded.query("SELECT COUNT(*) FROM step_closed WHERE LENGTH(late_parts) > 0")
    assert late == [(2,)]


def test_a_replay_is_the_same_byte_for_byte_and_goes_to_a_fresh_run(recorded: WorkerProcess) -> None:
    out = recorded.folder / "replayed"
    done = recorded.run("replay", str(recorded.journal), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("identical to what was recorded") == 2
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    kept = recorded.query("SELECT run_id, position, kind, payload FROM outbox ORDER BY run_id, position")
    assert [(line["run_id"], line["position"], line["kind"]) for line in lines] == [row[:3] for row in kept]
    assert [line["payload"] for line in lines] == [json.loads(payload) for *_, payload in kept]
    for row, line in zip(kept, (out / "rows.jsonl").read_bytes().splitlines(), strict=True):
        assert line.endswith(b'"payload":' + bytes(row[3]) + b"}")
    assert len(list(out.glob("wandb/offline-run-*"))) == 2
    assert (out / "report.html").is_file()
    again = recorded.run("replay", str(recorded.journal), "--out", str(out))
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_a_run_that_was_tampered_with_is_told(recorded: WorkerProcess) -> None:
    tampered = recorded.folder / "tampered"
    tampered.mkdir()
    for file in recorded.journal.glob("*.sqlite*"):
        (tampered / file.name).write_bytes(file.read_bytes())
    with closing(sqlite3.connect(tampered / "index.sqlite")) as connection, connection:
        connection.execute("UPDATE outbox SET payload = '{}' WHERE run_id = 'run-1' AND position = 3")
    told: list[Comparison] = []
    _, (first, second) = replay(tampered, recorded.folder / "tampered-out", told.append)
    assert told == [first, second]
    assert (first.is_identical, first.first_difference) == (False, 3)
    assert second.is_identical


def test_a_replay_needs_no_outbox_and_no_state(recorded: WorkerProcess) -> None:
    """The rebuilt entries come from messages and decisions, not from a copy of what was recorded."""
    bare = recorded.folder / "bare"
    bare.mkdir()
    for file in recorded.journal.glob("*.sqlite*"):
        (bare / file.name).write_bytes(file.read_bytes())
    with closing(sqlite3.connect(bare / "index.sqlite")) as connection, connection:
        connection.execute("DELETE FROM outbox")
        connection.execute("DELETE FROM state")
    folder, (first, _) = replay(bare, recorded.folder / "bare-out", lambda _made: None)
    assert first.first_difference == 0
    rebuilt, source = Journal(folder, read_only=True), Journal(recorded.journal, read_only=True)
    assert list(entries_of(rebuilt.index, "run-1")) == list(entries_of(source.index, "run-1"))
    rebuilt.close()
    source.close()
