"""A worker, a steady publisher and a W&B backend on loopback, to bring trouble between them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from tests.support.kill_campaign import TunedWorker, start_publisher, stop_publisher
from tests.support.kill_counts import Expected, count_journal, count_online
from tests.support.steady_publisher import INCARNATION, RUN_ID
from tests.support.wandb_backend import BackendRun, WandbBackend
from tests.support.worker_process import wait_until

STEPS_PER_SECOND = 20.0
PATIENCE = {
    "SIDESTEP_WANDB_ROWS_PER_SECOND": "0",
    "SIDESTEP_WANDB_INIT_SECONDS": "3",
    "SIDESTEP_WANDB_STALL_SECONDS": "4",
}


class WandbScene:
    """A context manager; what it started is ended with it."""

    def __init__(self, backend: WandbBackend, **variables: str) -> None:
        """Start nothing yet; ``variables`` are the worker's, beside ``PATIENCE``."""
        self.backend = backend
        self.worker = TunedWorker(wandb_mode="online", variables={**backend.environment, **PATIENCE, **variables})
        self.publisher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.worker.start()
        self.publisher = start_publisher(self.worker.address, self.worker.folder, STEPS_PER_SECOND)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.publisher is not None and self.publisher.poll() is None:
            self.publisher.kill()
            self.publisher.wait()
        self.worker.kill_tree()
        self.worker.remove()

    @property
    def run(self) -> BackendRun:
        """The run at the backend; an empty one before it is there."""
        return self.backend.runs.get(RUN_ID) or BackendRun(name=RUN_ID)

    @property
    def status(self) -> dict[str, Any]:
        """The sink as ``/healthz`` says it."""
        return self.worker.wandb_status()

    @property
    def num_closed(self) -> int:
        """Steps that the worker has closed: receiving goes on."""
        return len(self.worker.closed_steps())

    def wait(self, ready: Callable[[], object], what: str, timeout_seconds: float = 40.0) -> None:
        """Wait until ``ready``; a failure shows the sink."""
        try:
            wait_until(ready, what, timeout_seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; the sink: {self.status}; the log:\n{self._warnings()}") from error

    def _warnings(self) -> str:
        return "\n".join(line for line in self.worker.text().splitlines() if "WARNING" in line or "INFO" in line)

    def wait_for_rows(self, num_rows: int) -> None:
        """Wait until the backend has so many rows."""
        self.wait(lambda: len(self.run.history) >= num_rows, f"{num_rows} rows at the backend")

    def wait_for_complaint(self, code: str, *words: str) -> None:
        """Wait until health, log and the trainer's console tell of a trouble; receiving goes on meanwhile."""
        closed = self.num_closed
        self.wait(lambda: all(word in self.status.get("complaint", "") for word in words), f"a complaint with {words}")
        self.wait(lambda: f"({code})" in self.worker.text(), f"the log tells of {code}")
        console = self.worker.folder / "publisher.log"
        self.wait(lambda: f"({code})" in console.read_text(errors="replace"), f"the trainer's console tells of {code}")
        self.wait(lambda: self.num_closed > closed + STEPS_PER_SECOND, "steps are closed meanwhile")
        assert self.worker.health()["healthy"], "a sink that lags is no illness"

    def core(self) -> int:
        """Return the process id of wandb-core."""
        (found,) = self.worker.sink_processes() - {self.status["pid"]}
        return found

    def finish(self, timeout_seconds: float = 80.0) -> None:
        """End the training; assert that nothing was lost anywhere, and that the worker ends well."""
        assert self.publisher is not None
        published = stop_publisher(self.publisher, self.worker.folder)
        self.wait(self.worker.has_delivered, "W&B has all", timeout_seconds)
        assert self.status["complaint"] == ""
        expected = Expected.read(self.worker.journal, RUN_ID)
        assert count_journal(self.worker.journal, expected, published, INCARNATION).wrong() == []
        assert count_online(expected, self.backend, RUN_ID).wrong() == []
        assert self.run.state == "finished"
        assert self.worker.terminate() == 0
