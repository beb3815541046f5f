"""Runs that had ended before a worker starts: known and told as ever, not woken, until something of them comes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.message_line import RUN, Line
from tests.support.wire_trainer import WireTrainer, make_hello
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol.messages import Goodbye, Notice
from sidestep.worker.pipeline import RunPipeline
from sidestep.worker.settled import KnownRun, SettledRun, open_runs


def opened(line: Line) -> KnownRun:
    return open_runs(line.journal, line._pipeline)[RUN]


def test_a_settled_run_answers_as_its_pipeline_would(tmp_path: Path) -> None:
    line = Line(tmp_path / "journal")
    line.greet()
    line.steps_of(range(3))
    assert isinstance(opened(line), RunPipeline), "it goes on"
    line.say(Goodbye(newest_step=2), numbered=True)
    line.advance()
    line.restart()
    settled, woken = opened(line), line.pipelines[RUN]
    assert isinstance(settled, SettledRun)
    assert settled.statistics() == woken.statistics()
    assert settled.standing(5.0) == woken.standing(5.0) == (2, 0.0)
    assert (settled.newest, settled.is_ended) == (woken.newest, woken.is_ended)
    assert settled.open_incarnations == woken.open_incarnations == []
    assert woken.recovery_start() is None
    assert settled.advance(0.0, {}) == woken.advance(0.0, {})
    line.say(Notice(text="one more word"), numbered=True)
    assert isinstance(opened(line), RunPipeline), "something is not accounted for"
    line.journal.close()


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess()
    yield made
    made.remove()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def runs_told(worker: WorkerProcess) -> dict[str, dict[str, object]]:
    done = worker.run("status", str(worker.journal), "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, dict[str, object]] = json.loads(done.stdout)["runs"]
    kept = ("attempt", "world_size", "is_ended", "closed_step", "open_steps", "attempts")
    return {run_id: {key: report[key] for key in kept} for run_id, report in told.items()}


def test_the_status_tells_of_ended_runs_and_one_that_speaks_again_goes_on(
    worker: WorkerProcess, stack: ExitStack
) -> None:
    worker.start()
    trainers = [
        stack.enter_context(WireTrainer(worker.address, run_id=f"run-{at}", incarnation=f"inc-{at}")) for at in range(4)
    ]
    for at, trainer in enumerate(trainers):
        trainer.greet(make_hello(topology={"host": "elsewhere", "pid": 1}))
        sent = [trainer.send_step(step) for step in range(at + 1)]
        last = [trainer.goodbye(at)] if at < 3 else []
        trainer.wait_for_acks([*(number for numbers in sent for number in numbers), *last])
    wait_until(lambda: len(worker.query("SELECT * FROM ending")) == 3, "three runs end")
    wait_until(lambda: len(worker.closed_steps()) == 10, "all steps close")
    query = "SELECT run_id, position, payload FROM outbox ORDER BY run_id, position"
    before, outbox = runs_told(worker), worker.query(query)
    assert [report["is_ended"] for report in before.values()] == [True, True, True, False]
    for _ in range(2):
        worker.kill()
        worker.start()
        assert runs_told(worker) == before
    trainers[3].connect()
    trainers[3].wait_for_acks([*trainers[3].send_step(4), trainers[3].goodbye(4)])
    trainers[1].connect()  # it had said goodbye, and says one thing more
    trainers[1].wait_for_acks(trainers[1].send_step(2))
    wait_until(lambda: runs_told(worker)["run-3"]["is_ended"], "the open run ends")
    wait_until(lambda: runs_told(worker)["run-1"]["closed_step"] == 2, "the run that speaks again goes on")
    time.sleep(0.2)
    assert len(worker.query("SELECT * FROM step_closed")) == 12
    assert [entry for entry in worker.query(query) if entry in outbox] == outbox, "what was written stays, once"
