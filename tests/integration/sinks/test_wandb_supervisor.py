"""The supervisor and its child, with the child killed, stopped and starved; every row arrives once, at its own step."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.integration.sinks.conftest import Supervise
from tests.support.outbox_writing import OutboxWriter, row_entry, run_entry
from tests.support.wandb_backend import WandbBackend
from tests.support.wandb_offline import read_fragments
from tests.support.wandb_supervising import (
    FINISH,
    assert_every_row_once,
    is_finished,
    sink_processes,
    sync_fragments,
    until,
    write_and_kill,
)

from sidestep.worker.sinks.wandb_progress import SinkState
from sidestep.worker.sinks.wandb_supervisor import WandbSinkConfig


@pytest.mark.slow
def test_kills_offline_lose_no_row_and_double_none_and_the_fragments_sync(
    outbox: OutboxWriter, supervise: Supervise, backend: WandbBackend, tmp_path: Path
) -> None:
    supervisor = supervise()
    kills = write_and_kill(supervisor, outbox, tmp_path, rows=150, seed=random.randrange(1 << 30))
    status = supervisor.status()
    assert status.counts["respawns"] >= kills
    assert (status.rows_behind, status.entries_behind, status.num_rows) == (0, 0, 150)
    run = read_fragments(tmp_path / "out")
    assert [row["train/step"] for row in run.rows] == [25 * number for number in range(150)]
    assert sorted({text for _, text, _ in run.alerts}) == sorted(f"x\n[incident i{n}]" for n in range(0, 150, 40))
    assert all(steps == list(range(len(steps))) for steps in run.own_steps)
    assert run.exit_codes[-1] == 0
    assert set(run.exit_codes[:-1]) <= {None}
    assert len(run.tables("generation/samples")) >= 6

    sync_fragments(tmp_path / "out", backend)
    assert_every_row_once(backend.runs["run1"], 150)


@pytest.mark.slow
def test_a_stopped_core_is_noticed_and_replaced(outbox: OutboxWriter, supervise: Supervise, tmp_path: Path) -> None:
    supervisor = supervise(stall_seconds=3.0)
    outbox.write([run_entry(), row_entry(0)])
    supervisor.start()
    until(supervisor, lambda: supervisor.status().position == 1)
    (core,) = sink_processes(tmp_path) - {supervisor.status().pid or 0}
    os.kill(core, signal.SIGSTOP)
    outbox.write([row_entry(1), row_entry(2)])
    until(supervisor, lambda: supervisor.status().counts["stalls"] == 1)
    assert "no progress for 3 s with 2 entries waiting" in supervisor.status().detail
    outbox.write([row_entry(3), FINISH])
    until(supervisor, lambda: is_finished(supervisor))
    assert [row["train/step"] for row in read_fragments(tmp_path / "out").rows] == [0, 25, 50, 75]
    assert supervisor.status().counts == {
        "starts": 2, "respawns": 1, "stalls": 1, "failures": 1, "unreadable_reports": 0, "stop_requests": 0,
        "refused_uploads": 0, "unreadable_outbox": 0, "unconfirmed_tables": 0,
    }  # fmt: skip


def test_what_comes_after_a_long_quiet_finds_a_patient_supervisor(
    outbox: OutboxWriter, supervise: Supervise, tmp_path: Path
) -> None:
    supervisor = supervise(stall_seconds=4.0)
    outbox.write([run_entry(), row_entry(0)])
    supervisor.start()
    until(supervisor, lambda: supervisor.status().position == 1)
    quiet_until = time.monotonic() + 4.5
    until(supervisor, lambda: time.monotonic() > quiet_until)
    outbox.write([row_entry(1), FINISH])
    supervisor.poll()  # looks before the child can
    until(supervisor, lambda: is_finished(supervisor))
    assert (supervisor.status().counts["stalls"], supervisor.status().counts["starts"]) == (0, 1)
    assert read_fragments(tmp_path / "out").exit_codes == [0]


def test_a_stop_drains_the_outbox_and_leaves_the_run_open(
    outbox: OutboxWriter, supervise: Supervise, tmp_path: Path
) -> None:
    supervisor = supervise()
    outbox.write([run_entry(), *map(row_entry, range(20))])
    supervisor.start()
    until(supervisor, lambda: supervisor.status().state is SinkState.RUNNING)
    assert supervisor.stop(30.0)
    assert supervisor.status().state is SinkState.SUSPENDED
    assert (supervisor.status().rows_behind, supervisor.status().pid) == (0, None)
    later = supervise()
    outbox.write([row_entry(20), FINISH])
    later.start()
    until(later, lambda: is_finished(later))
    run = read_fragments(tmp_path / "out")
    assert [row["train/step"] for row in run.rows] == [25 * number for number in range(21)]
    assert run.exit_codes == [1, 0]


def test_a_sink_whose_worker_is_gone_ends(outbox: OutboxWriter, supervise: Supervise, tmp_path: Path) -> None:
    supervisor = supervise()
    outbox.write([run_entry(), row_entry(0)])
    supervisor.start()
    until(supervisor, lambda: supervisor.status().num_rows == 1)
    child = supervisor._child
    assert child is not None
    assert child.stdin is not None
    child.stdin.close()  # what the kernel does when the worker dies
    child.wait(timeout=20)
    until(supervisor, lambda: supervisor.status().pid is None)
    assert supervisor.status().state is SinkState.SUSPENDED


def test_disabled_starts_nothing(supervise: Supervise, outbox: OutboxWriter, tmp_path: Path) -> None:
    outbox.write([run_entry(), row_entry(0)])
    supervisor = supervise(mode="disabled")
    supervisor.start()
    supervisor.poll()
    status = supervisor.status()
    assert (status.state, status.pid, status.counts["starts"]) == (SinkState.DISABLED, None, 0)
    assert supervisor.stop(0.1)
    assert not (tmp_path / "out").exists()


def test_a_sink_that_cannot_start_is_tried_again(outbox: OutboxWriter, supervise: Supervise, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where a folder should be")
    supervisor = supervise()
    supervisor.start()
    until(supervisor, lambda: supervisor.status().counts["failures"] == 2)
    assert "cannot be started" in supervisor.status().detail
    (tmp_path / "out").unlink()
    outbox.write([run_entry(), row_entry(0), FINISH])
    until(supervisor, lambda: is_finished(supervisor))


@pytest.mark.parametrize("changes", [{"run_id": ""}, {"stall_seconds": 0.0}, {"backoff_max_seconds": -1.0}])
def test_a_wrong_setting_is_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"WandbSinkConfig.{next(iter(changes))}"):
        WandbSinkConfig(**{"journal": Path("j"), "run_id": "r", "out": Path("o"), **changes})


def test_a_stop_right_after_the_start_sends_what_waits_all_the_same(
    outbox: OutboxWriter, supervise: Supervise, tmp_path: Path
) -> None:
    supervisor = supervise()
    outbox.write([run_entry(), *map(row_entry, range(20))])
    supervisor.start()
    assert supervisor.stop(30.0)
    assert supervisor.status().state is SinkState.SUSPENDED
    assert (supervisor.status().rows_behind, supervisor.status().entries_unconfirmed) == (0, 0)
    assert len(read_fragments(tmp_path / "out").rows) == 20
