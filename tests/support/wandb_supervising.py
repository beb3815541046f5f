"""Supervised W&B sinks: waiting for one, and killing its processes while rows are written."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.outbox_writing import OutboxWriter, row_entry, run_entry, table_entry
from tests.support.wandb_backend import BackendRun, WandbBackend

from sidestep.worker.outbox import OutboxEntry, entry
from sidestep.worker.sinks.wandb_processes import mark_of, marked_processes
from sidestep.worker.sinks.wandb_progress import SinkState
from sidestep.worker.sinks.wandb_supervisor import WandbSupervisor

FINISH = entry("finish", {"exit_code": 0, "reason": ""})


def sink_processes(tmp_path: Path) -> set[int]:
    return marked_processes(mark_of(tmp_path / "out", "run1"))


def until(supervisor: WandbSupervisor, ready: Callable[[], bool], timeout_seconds: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not ready():
        assert time.monotonic() < deadline, supervisor.status()
        supervisor.poll()
        time.sleep(0.02)


def is_finished(supervisor: WandbSupervisor) -> bool:
    status = supervisor.status()
    return status.state is SinkState.FINISHED and status.entries_behind == 0 and status.position >= 0


def some_entry(number: int) -> OutboxEntry:
    """Make a table or a row, so large that W&B's log is killed in the middle of a record more often than not."""
    long = {"loss/note": "x" * 1_000}
    return table_entry(number, f"table-{number}") if number % 25 == 7 else row_entry(number, **long)


def write_and_kill(supervisor: WandbSupervisor, outbox: OutboxWriter, tmp_path: Path, *, rows: int, seed: int) -> int:
    """Write rows one by one while the child, its wandb-core or both are killed; return the number of kills."""
    chance, number, kills = random.Random(seed), 0, 0
    killed: int | None = None
    outbox.write([run_entry()])
    supervisor.start()
    next_kill = time.monotonic() + chance.uniform(0.5, 2.0)
    while number < rows or kills < 4:
        supervisor.poll()
        if number < rows:
            alert = entry("alert", {"id": f"i{number}", "title": "t", "text": "x", "level": "warning"})
            outbox.write([some_entry(number), *([alert] if number % 40 == 0 else [])])
            number += 1
        child = supervisor.status().pid
        if child is not None and child != killed and kills < 4 and time.monotonic() > next_kill:
            targets = chance.choice([sink_processes(tmp_path), {child}, sink_processes(tmp_path) - {child}])
            for pid in targets:  # may be none: a child that begins has no wandb-core yet
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if targets:
                kills, killed = kills + 1, child
                next_kill = time.monotonic() + chance.uniform(0.2, 2.5)
        time.sleep(0.02)
    outbox.write([FINISH])
    # not `is_finished`: tables whose upload a kill may have undone wait for the worker, which is the test here
    until(supervisor, lambda: supervisor.status().state is SinkState.FINISHED and supervisor.status().rows_behind == 0)
    return kills


def assert_every_row_once(run: BackendRun, rows: int) -> None:
    assert [row["_step"] for row in run.history] == list(range(rows))
    assert [row["train/step"] for row in run.history] == [25 * number for number in range(rows)]
    assert (run.holes, run.overwritten_lines, run.exit_code) == (0, 0, 0)


def sync_fragments(out: Path, backend: WandbBackend, timeout_seconds: float = 40.0) -> None:
    """Bring a folder's offline fragments to the server by W&B's own command, which ends with 0 whatever it met."""
    fragments = sorted(str(place) for place in (out / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "sync", *fragments]
    environment = {**os.environ, **backend.environment, "WANDB_SILENT": "false"}
    done = subprocess.run(command, check=True, env=environment, capture_output=True, timeout=timeout_seconds, text=True)
    assert done.stderr.count("Finished syncing") == len(fragments), done.stderr
    assert "ERROR" not in done.stderr
