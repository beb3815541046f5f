"""How a run ends at W&B: the trainer dies, the worker is asked to end, W&B is away at the end, nobody comes back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.support.kill_campaign import TunedWorker, start_publisher
from tests.support.kill_counts import Expected, count_online
from tests.support.steady_publisher import RUN_ID
from tests.support.wandb_backend import WandbBackend
from tests.support.wandb_offline import read_fragments
from tests.support.wandb_scene import WandbScene
from tests.support.wandb_supervising import sync_fragments
from tests.support.worker_process import wait_until

pytestmark = [pytest.mark.timeout(150), pytest.mark.slow]


@pytest.fixture
def backend() -> Iterator[WandbBackend]:
    with WandbBackend() as made:
        yield made


def test_a_worker_that_ends_in_between_and_a_trainer_that_is_killed(backend: WandbBackend) -> None:
    with WandbScene(backend) as scene:
        scene.worker._options += ["--trainer-silence-seconds", "1"]
        scene.wait_for_rows(20)
        assert scene.worker.terminate() == 0, scene.worker.text()
        assert scene.run.exit_code == 1, "left to be resumed"
        held = len(Expected.read(scene.worker.journal, RUN_ID).rows)
        assert len(scene.run.history) == held, "everything that was closed is at W&B"
        scene.worker.start()
        scene.wait_for_rows(held + 40)
        assert scene.publisher is not None
        scene.publisher.kill()
        scene.publisher.wait()
        scene.wait(scene.worker.has_delivered, "the run is finished")
        expected = Expected.read(scene.worker.journal, RUN_ID)
        counts = count_online(expected, backend, RUN_ID)
        assert counts.wrong() == ["exit_code_wrong = 1"]
        assert (scene.run.state, scene.run.exit_code) == ("failed", 1)
        assert scene.run.history[-1]["sidecar/tail_unknown"] == 1
        assert expected.entries[-1].value()["reason"].startswith("the trainer's process")
        assert scene.worker.terminate() == 0


def test_what_an_end_could_not_upload_is_named_and_kept_and_the_next_worker_sends_it(backend: WandbBackend) -> None:
    """The sink has handed everything over and has nothing left to do; that is not what counts."""
    with WandbScene(backend, SIDESTEP_WANDB_FINISH_SECONDS="3") as scene:
        scene.wait_for_rows(20)
        backend.stop()
        assert scene.publisher is not None
        scene.worker._options += ["--sink-drain-seconds", "8"]
        (scene.worker.folder / "stop").touch()
        scene.publisher.wait(60)
        scene.wait(lambda: scene.worker.query("SELECT * FROM ending"), "the run ends")
        scene.wait(lambda: scene.status["counts"]["failures"] >= 1, "a finish that uploaded nothing")
        assert scene.status["entries_unconfirmed"] > 0
        assert not scene.worker.has_delivered()
        assert scene.worker.terminate(60) == 1
        assert f"entries of run {RUN_ID} have not reached W&B; they are kept in" in scene.worker.text()
        backend.start()
        scene.worker._options += ["--until-idle", "--idle-exit-seconds", "0.5"]
        scene.worker.start()
        assert scene.worker.process is not None
        assert scene.worker.process.wait(60) == 0, scene.worker.text()
        assert count_online(Expected.read(scene.worker.journal, RUN_ID), backend, RUN_ID).wrong() == []
        assert scene.run.state == "finished"


def torn_run() -> TunedWorker:
    """Kill trainer, worker and sink of an offline run, whose newest fragment ends in the middle of a record."""
    worker = TunedWorker(wandb_mode="offline", variables={})
    worker.start()
    publisher = start_publisher(worker.address, worker.folder)
    try:
        wait_until(lambda: len(read_fragments(worker.out).rows) > 100, "rows in the fragment", 40.0)
    finally:
        publisher.kill()
        publisher.wait()
        worker.kill_tree()
    wait_until(lambda: not worker.sink_processes(), "the sink is gone")
    (log,) = (worker.out / "wandb").glob(f"offline-run-*/run-{RUN_ID}.wandb")
    os.truncate(log, log.stat().st_size - 20)
    return worker


def test_a_torn_run_that_nobody_finished_is_repaired_by_a_replay(backend: WandbBackend) -> None:
    worker = torn_run()
    try:
        done = worker.run("replay", str(worker.journal), "--out", str(worker.folder / "again"), timeout_seconds=60)
        assert done.returncode == 0, done.stdout + done.stderr
        sync_fragments(worker.folder / "again", backend)
        expected = Expected.read(worker.journal, RUN_ID)
        assert count_online(expected, backend, RUN_ID).wrong() == ["exit_code_wrong = 1"]
        assert backend.runs[RUN_ID].state == "failed", "nobody said how it ended"
    finally:
        worker.remove()


def test_a_torn_run_that_nobody_finished_is_repaired_by_a_worker(backend: WandbBackend) -> None:
    worker = torn_run()
    try:
        worker._options += ["--until-idle", "--idle-exit-seconds", "0.5", "--trainer-silence-seconds", "0.5"]
        worker.start()
        assert worker.process is not None
        assert worker.process.wait(60) == 0, worker.text()
        sync_fragments(worker.out, backend)
        expected = Expected.read(worker.journal, RUN_ID)
        assert count_online(expected, backend, RUN_ID).wrong() == ["exit_code_wrong = 1"]
        assert expected.entries[-1].kind == "finish"
    finally:
        worker.remove()
