"""How a run ends when its trainer does not say so, and how a worker ends (docs/delivery.md, section 10)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.wire_trainer import WireTrainer, make_hello
from tests.support.worker_process import WorkerProcess, wait_until

TRAINER = """
import sys, time
from tests.support.wire_trainer import CONTENTS, make_hello, step_messages
from sidestep.protocol.frames import Envelope
from sidestep.trainer_hooks.publisher import Publisher

identity = Envelope(run_id="run-1", incarnation="inc-1", rank=0)
publisher = Publisher(sys.argv[1], identity, make_hello(), blobs=CONTENTS).start()
for step in range(100_000):
    for message in step_messages(step):
        publisher.submit(message)
    print(sum(account.accepted for account in publisher.accounts().values()), flush=True)
    time.sleep(0.02)
"""


@pytest.fixture
def folder_of_workers() -> Iterator[list[WorkerProcess]]:
    made: list[WorkerProcess] = []
    yield made
    for worker in made:
        worker.remove()


def rows(worker: WorkerProcess) -> list[dict[str, Any]]:
    return [value for kind, value in worker.outbox() if kind == "row"]


def test_a_killed_trainers_run_has_all_it_acked_ends_as_failed_and_its_worker_follows(
    folder_of_workers: list[WorkerProcess],
) -> None:
    worker = WorkerProcess()
    folder_of_workers.append(worker)
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, worker.address], stdout=subprocess.PIPE, text=True)
    try:
        worker._options += ["--owner-pid", str(trainer.pid)]
        worker._options += ["--idle-exit-seconds", "0.2", "--trainer-silence-seconds", "0.5"]
        worker.start()
        wait_until(lambda: len(worker.closed_steps()) >= 20, "steps close")
        trainer.kill()
        assert trainer.stdout is not None
        with trainer.stdout:
            *_, num_accepted = [int(line) for line in trainer.stdout if line.endswith("\n")]
        trainer.wait()
        assert worker.process is not None
        assert worker.process.wait(30) == 0, worker.text()
    finally:
        trainer.kill()
        trainer.wait()
    stored = worker.query("SELECT sequence FROM message ORDER BY sequence", "segment-000001.sqlite")
    assert [sequence for (sequence,) in stored] == list(range(1, len(stored) + 1))
    assert len(stored) >= num_accepted > 0
    closed = [step for _, step, _ in worker.closed_steps()]
    assert closed == list(range(len(closed)))
    kind, end = worker.outbox()[-1]
    assert (kind, end["exit_code"]) == ("finish", 1)
    assert f"the trainer's process {trainer.pid} is gone; it had made " in end["reason"]
    assert f"{len(stored)} are here" in end["reason"]
    tail = rows(worker)[-1]
    assert tail["sidecar/tail_unknown"] == 1
    assert len(stored) <= tail["sidecar/produced"] + 4, "the last message stored tells of those before it"
    assert tail["sidecar/journal_rows"] == len(stored)


def test_a_trainer_elsewhere_is_given_up_after_a_long_silence_and_goes_on_where_it_comes_back(
    folder_of_workers: list[WorkerProcess],
) -> None:
    worker = WorkerProcess("--trainer-silence-seconds", "0.5")
    folder_of_workers.append(worker)
    worker.start()
    place = {**make_hello().topology, "host": "another.example"}
    with WireTrainer(worker.address) as trainer:
        trainer.greet(make_hello(topology=place))
        trainer.wait_for_acks(trainer.send_step(0))
        wait_until(lambda: worker.query("SELECT * FROM ending"), "it is given up")
        kind, end = worker.outbox()[-1]
        assert (kind, end["exit_code"]) == ("finish", 1)
        assert "nothing was heard of the trainer" in end["reason"]
        trainer.wait_for_acks([*trainer.send_step(1), trainer.goodbye(1)])
        wait_until(lambda: len(worker.query("SELECT * FROM ending")) == 2, "it ends in order")
    assert worker.closed_steps() == [(0, 0, "complete"), (0, 1, "complete")]
    assert worker.query("SELECT exit_code, tail_unknown FROM ending ORDER BY closed_number") == [(1, 1), (0, 0)]
    kind, end = worker.outbox()[-1]
    assert (kind, end["exit_code"]) == ("finish", 0)
    rates = [row["train/step"] for row in rows(worker) if "lr/vision_encoder" in row]
    assert rates == [0, 1]


def test_sigterm_names_what_w_and_b_lacks_and_the_next_worker_has_it(
    folder_of_workers: list[WorkerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port of nobody
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    worker = WorkerProcess("--sink-drain-seconds", "2", wandb_mode="online")
    folder_of_workers.append(worker)
    worker.start()
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        trainer.wait_for_acks([*trainer.send_step(0), trainer.goodbye(0)])
        wait_until(lambda: worker.query("SELECT * FROM ending"), "the run ends")
    num_entries = len(worker.outbox())
    asked_at = time.monotonic()
    assert worker.terminate() == 1
    assert time.monotonic() - asked_at < 30, "far within the grace of a container"
    assert f"{num_entries} entries of run run-1 have not reached W&B" in worker.text()
    said = json.loads((worker.journal / "worker.json").read_text())
    assert (said["exit_code"], said["behind"]) == (1, {"run-1": num_entries})
    shown = worker.run("status").stdout
    assert f"W&B lacked {num_entries} entries" in shown
    assert f"sidestep worker --journal {worker.journal} --endpoint {worker.address} --until-idle" in shown
    assert len(worker.outbox()) == num_entries, "nothing of it is lost"


def test_sigterm_ends_the_run_of_a_trainer_that_has_just_died(folder_of_workers: list[WorkerProcess]) -> None:
    worker = WorkerProcess()
    folder_of_workers.append(worker)
    worker.start()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with WireTrainer(worker.address) as trainer:
        trainer.greet(make_hello(topology={**make_hello().topology, "pid": gone.pid}))
        trainer.wait_for_acks(trainer.send_step(0))
    assert worker.terminate() == 0
    assert worker.query("SELECT exit_code, tail_unknown FROM ending") == [(1, 1)]
    assert json.loads(worker.run("status", "--json").stdout)["holds"]["runs"]["run-1"]["exit_code"] == 1
