"""A real training with faults injected into its own side of the pipe: counted, survived, and no step waits for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.faults_scene import MakeTraining, a_worker, assert_all_arrived, trainings
from tests.support.worker_process import WorkerProcess

from sidestep.protocol.faults import Faults, recorded_counts
from sidestep.trainer_hooks.faults import RECEIVE, SEND, STAGE, TICK

NUM_STEPS = 40

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    with a_worker() as made:
        yield made


@pytest.fixture
def make_training(tmp_path: Path) -> Iterator[MakeTraining]:
    with trainings(tmp_path) as make:
        yield make


@pytest.mark.parametrize(
    "plan",
    [
        lambda: Faults().delay_at(RECEIVE, kind="ack", seconds=0.4, times=0),
        lambda: Faults().stall_at(SEND, seconds=0.5, step=3, times=3),
        lambda: Faults().fail_at(STAGE, step=4, kind="losses", times=2).fail_at(TICK, step=6, times=5),
    ],
    ids=["acks late", "no room", "our own failures"],
)
def test_a_slow_worker_and_failures_of_ours_are_counted_and_harmless(
    worker: WorkerProcess, make_training: MakeTraining, tmp_path: Path, plan: Callable[[], Faults]
) -> None:
    record = tmp_path / "struck"
    text = json.dumps({**json.loads(plan().to_json()), "record": str(record)})
    worker.start()
    training = make_training(worker.address, environment={"SIDESTEP_FAULTS": text})
    num_steps = training.wait_for_steps(NUM_STEPS)
    last = training.stop()
    struck = recorded_counts(record)
    wanted = {f"{fault.action} {fault.where}": fault.times or 1 for fault in plan()._plan}
    assert struck.keys() == wanted.keys()
    assert all(struck[name] >= times for name, times in wanted.items())
    training.assert_unharmed(num_steps=num_steps)
    assert sum(last["failures"].values()) == struck.get("fail trainer.stage", 0), "each is counted where it was caught"
    assert_all_arrived(worker, training)
