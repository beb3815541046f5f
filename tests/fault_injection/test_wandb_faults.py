"""W&B away, refusing, slow or dead, over real processes: training and receiving go on, every row arrives once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from tests.support.wandb_backend import Fault, WandbBackend
from tests.support.wandb_scene import WandbScene

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]


@pytest.fixture
def backend() -> Iterator[WandbBackend]:
    with WandbBackend() as made:
        yield made


def test_a_server_that_is_away_at_the_start_and_again_later(backend: WandbBackend) -> None:
    backend.stop()
    with WandbScene(backend, SIDESTEP_WANDB_STALL_SECONDS="30") as scene:  # a table waits for the server 19 s long
        scene.wait_for_complaint("wandb_unreachable", "CommError")
        assert scene.status["state"] in {"starting", "failed"}
        backend.start()
        scene.wait_for_rows(20)
        scene.wait(lambda: scene.status["complaint"] == "", "the trouble is over")
        assert "takes run steady again" in scene.worker.text()
        backend.stop()
        scene.wait_for_complaint("wandb_unreachable", "does not answer")
        assert scene.status["entries_unconfirmed"] > scene.status["entries_behind"]
        backend.start()
        scene.finish()


def test_a_server_that_asks_for_patience(backend: WandbBackend) -> None:
    with WandbScene(backend) as scene:
        scene.wait_for_rows(20)
        for status, code in ((429, "wandb_rate_limited"), (503, "wandb_unreachable")):
            backend.faults["filestream"] = Fault(status=status)
            scene.wait_for_complaint(code, f"HTTP {status}")
            backend.faults.clear()
            scene.wait(lambda: scene.status["complaint"] == "", f"the trouble of {status} is over")
        scene.finish()


def test_a_server_that_refuses_an_upload_for_good(backend: WandbBackend) -> None:
    """After one HTTP 400 wandb-core gives the run's uploads up; a new sink goes on where the server stands."""
    with WandbScene(backend) as scene:
        scene.wait_for_rows(20)
        backend.faults["filestream"] = Fault(status=400)
        scene.wait_for_complaint("wandb_refused", "HTTP 400")
        pid = scene.status["pid"]
        scene.wait(lambda: scene.status["pid"] not in {pid, None}, "another sink begins")
        num_refused = backend.operations["fault filestream"]
        backend.faults.clear()
        num_rows = len(scene.run.history)
        scene.wait_for_rows(num_rows + 20)
        scene.finish()
        assert num_refused >= 1


def test_a_core_that_dies_and_one_that_stops(backend: WandbBackend) -> None:
    with WandbScene(backend) as scene:
        scene.wait_for_rows(20)
        os.kill(scene.core(), signal.SIGKILL)
        scene.wait_for_complaint("wandb_sink_ended")
        scene.wait(lambda: scene.status["complaint"] == "", "the trouble is over")
        scene.wait(lambda: len(scene.worker.sink_processes()) == 2, "a child and a core")
        os.kill(core := scene.core(), signal.SIGSTOP)
        scene.wait_for_complaint("wandb_stalled", "no progress for 4 s")
        scene.wait(lambda: core not in scene.worker.sink_processes(), "the stopped core is killed")
        scene.finish()
        assert scene.worker.text().count("is killed: no progress") == 1
