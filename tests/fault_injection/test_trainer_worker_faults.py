"""A real training while its worker is absent, late, dead, stopped, slow or elsewhere: the training is not concerned.

In every case the losses are, bit for bit, those of a training without hooks, nothing is raised, the loop goes on while
the worker is in trouble, and what the accounts say is what the journal holds.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.faults_scene import MakeTraining, a_worker, assert_all_arrived, closed_steps, trainings
from tests.support.rank_processes import free_port
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.worker.keys import make_keys

A_WHILE_STEPS = 15

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    with a_worker() as made:
        yield made


@pytest.fixture
def make_training(tmp_path: Path) -> Iterator[MakeTraining]:
    with trainings(tmp_path) as make:
        yield make


def test_a_worker_that_is_absent_at_the_start_and_comes_later_gets_everything(
    worker: WorkerProcess, make_training: MakeTraining
) -> None:
    training = make_training(worker.address)
    training.wait_for_steps(A_WHILE_STEPS)
    worker.start()
    training.wait_for_steps(A_WHILE_STEPS)
    assert training.stop()["failures"] == {}
    training.assert_unharmed(num_steps=2 * A_WHILE_STEPS)
    assert_all_arrived(worker, training)


def test_a_worker_that_was_dead_before_leaves_its_socket_and_no_trace_on_the_training(
    worker: WorkerProcess, make_training: MakeTraining
) -> None:
    worker.start()
    worker.kill()
    assert Path(worker.address.removeprefix("ipc://")).exists(), "a dead worker's socket stays behind"
    training = make_training(worker.address, "--close-seconds", "0.5")
    training.wait_for_steps(A_WHILE_STEPS)
    last = training.stop()
    assert last["failures"] == {}
    training.assert_unharmed(num_steps=A_WHILE_STEPS)
    assert "messages had not reached the worker" in training.said(), "what is lost is said"
    assert closed_steps(worker) == {}


def test_a_worker_that_dies_during_the_training_is_not_missed(
    worker: WorkerProcess, make_training: MakeTraining
) -> None:
    worker.start()
    training = make_training(worker.address, "--close-seconds", "0.5")
    wait_until(lambda: len(closed_steps(worker)) >= 5, "some steps closed")
    worker.kill()
    training.wait_for_steps(A_WHILE_STEPS)
    assert training.stop()["failures"] == {}
    training.assert_unharmed(num_steps=A_WHILE_STEPS + 5)
    known = closed_steps(worker)
    assert known == dict.fromkeys(range(len(known)), "complete")
    worker.start()  # nobody is there to send again: what it had acked is all that it has, and that the end is not known
    wait_until(lambda: worker.query("SELECT tail_unknown FROM ending"), "the attempt's end")
    assert worker.query("SELECT tail_unknown FROM ending") == [(1,)]
    assert len(known) <= len(closed_steps(worker)) < len(training.steps())


def test_a_worker_that_is_stopped_and_goes_on_gets_everything(
    worker: WorkerProcess, make_training: MakeTraining
) -> None:
    worker.start()
    training = make_training(worker.address)
    wait_until(lambda: len(closed_steps(worker)) >= 5, "some steps closed")
    assert worker.process is not None
    worker.process.send_signal(signal.SIGSTOP)
    training.wait_for_steps(2 * A_WHILE_STEPS)
    stopped_with = len(closed_steps(worker))
    training.wait_for_steps(A_WHILE_STEPS)
    assert len(closed_steps(worker)) == stopped_with, "it is stopped"
    worker.process.send_signal(signal.SIGCONT)
    training.wait_for_steps(A_WHILE_STEPS)
    assert training.stop()["failures"] == {}
    training.assert_unharmed(num_steps=4 * A_WHILE_STEPS)
    assert_all_arrived(worker, training)


# ----------------------------------------------------------------------------------- another address, the same name

HOST = "worker.sidestep.test"


def own_hosts_file(hosts: Path) -> list[str]:
    """Return the command that starts another one with ``hosts`` for its /etc/hosts, in a mount namespace of its own."""
    for flags in (["-m"], ["-Urm"]):
        prefix = ["unshare", *flags, "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]
        look_up = [*prefix, "getent", "hosts", HOST]
        try:
            found = subprocess.run(look_up, capture_output=True, text=True, timeout=10, check=False)
        except FileNotFoundError:
            break
        if found.returncode == 0 and HOST in found.stdout:
            return prefix
    pytest.skip("this user may make no mount namespace to have a hosts file of its own")


def test_a_worker_restarted_on_another_address_under_its_name_is_found(
    worker: WorkerProcess, make_training: MakeTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_keys(tmp_path / "keys")  # a name may lead anywhere, so that nothing is said to it without
    monkeypatch.setenv("SIDESTEP_KEYS", str(tmp_path / "keys"))
    hosts, port = tmp_path / "hosts", free_port()
    hosts.write_text(f"127.0.0.1 localhost\n127.0.0.2 {HOST}\n")
    prefix = own_hosts_file(hosts)
    worker.address = f"tcp://127.0.0.2:{port}"
    worker.start()
    training = make_training(f"tcp://{HOST}:{port}", prefix=prefix)
    wait_until(lambda: len(closed_steps(worker)) >= 5, "some steps closed")
    worker.kill()
    hosts.write_text(f"127.0.0.1 localhost\n127.0.0.3 {HOST}\n")  # the same file: the training sees it
    worker.address = f"tcp://127.0.0.3:{port}"
    worker.start()
    before = len(closed_steps(worker))
    training.wait_for_steps(A_WHILE_STEPS)
    wait_until(lambda: len(closed_steps(worker)) > before, "the worker is found at its new address")
    assert training.stop()["failures"] == {}
    training.assert_unharmed(num_steps=A_WHILE_STEPS)
    assert_all_arrived(worker, training)


# ------------------------------------------------------------------------------------------- the trainer's own death


def test_a_killed_trainer_has_left_all_but_its_last_step_and_the_run_says_what_is_not_known(
    worker: WorkerProcess, make_training: MakeTraining
) -> None:
    worker.start()
    training = make_training(worker.address, "--step-seconds", "0.25")
    wait_until(lambda: len(closed_steps(worker)) >= 5, "some steps closed")
    training.wait_for_steps(4)
    time.sleep(0.12)  # somewhere within a step
    training.kill()
    last = training.steps()[-1]["step"]
    training.assert_unharmed(num_steps=last + 1)
    wait_until(lambda: worker.query("SELECT 1 FROM ending"), "the worker notices")
    known = closed_steps(worker)
    assert [step for step, reason in known.items() if reason == "complete"][:last] == list(range(last))
    assert max(known) <= last + 1
    [(exit_code, reason, tail_unknown, newest)] = worker.query(
        "SELECT exit_code, reason, tail_unknown, newest_step FROM ending"
    )
    assert (exit_code != 0, tail_unknown) == (True, 1)
    assert "is gone" in reason
    assert newest >= last - 1
    rows = [payload for kind, payload in worker.outbox() if kind == "row" and "sidecar/tail_unknown" in str(payload)]
    assert len(rows) == 1
    assert "sidecar/produced" in str(rows[0]) or "produced" in str(rows[0]), rows[0]
