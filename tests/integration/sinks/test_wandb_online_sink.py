"""The W&B child process, online against a backend on loopback that counts holes and changed lines."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest
from tests.integration.sinks.conftest import Supervise
from tests.support.outbox_writing import OutboxWriter, row_entry, run_entry, table_entry
from tests.support.wandb_backend import BackendRun, Fault, WandbBackend
from tests.support.wandb_supervising import (
    FINISH,
    assert_every_row_once,
    is_finished,
    sink_processes,
    until,
    write_and_kill,
)

from sidestep.worker.sinks.wandb_progress import SinkState


@pytest.mark.slow
def test_kills_online_lose_no_row_and_double_none(
    outbox: OutboxWriter, supervise: Supervise, backend: WandbBackend, tmp_path: Path
) -> None:
    supervisor = supervise(backend)
    kills = write_and_kill(supervisor, outbox, tmp_path, rows=150, seed=random.randrange(1 << 30))
    assert supervisor.status().counts["respawns"] >= kills
    run = backend.runs["run1"]
    assert_every_row_once(run, 150)
    texts = {alert["text"] for alert in run.alerts}
    assert sorted(texts) == sorted(f"x\n[incident i{n}]" for n in range(0, 150, 40))
    assert run.config["lr"] == {"value": 0.001}
    assert set(supervisor.take_unconfirmed_tables()) <= {7, 32, 57, 82, 107, 132}
    assert supervisor.take_unconfirmed_tables() == ()


@pytest.mark.slow
def test_an_unreachable_server_delays_nobody_and_loses_nothing(
    outbox: OutboxWriter, supervise: Supervise, backend: WandbBackend, tmp_path: Path
) -> None:
    supervisor = supervise(backend)
    outbox.write([run_entry(), row_entry(0), row_entry(1)])
    supervisor.start()
    until(supervisor, lambda: supervisor.status().num_rows == 2)
    backend.stop()
    outbox.write([row_entry(2), row_entry(3)])
    until(supervisor, lambda: supervisor.status().num_rows == 4)
    for pid in sink_processes(tmp_path):
        os.kill(pid, signal.SIGKILL)
    until(supervisor, lambda: supervisor.status().counts["failures"] == 1)
    backend.start()
    outbox.write([row_entry(4), FINISH])
    until(supervisor, lambda: is_finished(supervisor))
    assert_every_row_once(backend.runs["run1"], 5)


@pytest.mark.slow
def test_a_finish_that_uploads_nothing_is_not_taken_for_done(
    outbox: OutboxWriter, supervise: Supervise, backend: WandbBackend
) -> None:
    supervisor = supervise(backend, finish_seconds=2.0)
    outbox.write([run_entry(), row_entry(0)])
    supervisor.start()
    until(supervisor, lambda: supervisor.status().num_rows == 1)
    backend.faults["filestream"] = Fault(status=500)
    outbox.write([row_entry(1), FINISH])
    until(supervisor, lambda: supervisor.status().counts["failures"] == 1)
    assert "Timed out finishing run" in supervisor.status().detail
    backend.faults.clear()
    until(supervisor, lambda: is_finished(supervisor))
    assert_every_row_once(backend.runs["run1"], 2)
    assert supervisor.status().counts["stalls"] == 0


@pytest.mark.slow
def test_a_post_of_a_killed_sink_that_lands_late_changes_nothing(
    outbox: OutboxWriter, supervise: Supervise, backend: WandbBackend, tmp_path: Path
) -> None:
    supervisor = supervise(backend)
    outbox.write([run_entry(), *map(row_entry, range(6))])
    supervisor.start()
    until(supervisor, lambda: supervisor.status().num_rows == 6)
    landing = threading.Event()
    backend.faults["filestream"] = Fault(until=landing, requests=1)
    outbox.write([row_entry(6), row_entry(7)])
    until(supervisor, lambda: backend.operations["fault filestream"] == 1)
    for pid in sink_processes(tmp_path):
        os.kill(pid, signal.SIGKILL)
    outbox.write([row_entry(8), FINISH])
    until(supervisor, lambda: is_finished(supervisor))
    run = backend.runs["run1"]
    landing.set()
    until(supervisor, lambda: backend.operations["stored late"] == 1)
    assert_every_row_once(run, 9)
    assert run.repeated_lines >= 2, "rows 6 and 7 at least, and those before them where no post was sooner"


@pytest.mark.slow
def test_the_pages_stop_and_a_refused_upload_are_told_apart(
    outbox: OutboxWriter, supervise: Supervise, backend: WandbBackend, tmp_path: Path
) -> None:
    """W&B asks for both alike. The page's stop is told once and the run goes on; what was refused is sent again."""
    refused = OutboxWriter(tmp_path / "other-journal", "run2")
    page = supervise(backend)
    fatal = supervise(backend, journal=refused.folder, run_id="run2", out=tmp_path / "other")
    refused.write([run_entry(), row_entry(0)])
    fatal.start()
    until(fatal, lambda: fatal.status().num_rows == 1)
    backend.faults["filestream run2"] = Fault(status=403, requests=1)
    refused.write([row_entry(1), row_entry(2)])

    backend.stopped_runs.add("run1")
    outbox.write([run_entry(), row_entry(0), row_entry(1)])
    page.start()

    def both_are_told() -> bool:
        fatal.poll()
        return page.status().counts["stop_requests"] + fatal.status().counts["refused_uploads"] == 2

    until(page, both_are_told)
    assert page.take_stop_request()
    assert not page.take_stop_request()
    outbox.write([row_entry(2), FINISH])
    until(page, lambda: is_finished(page))
    assert_every_row_once(backend.runs["run1"], 3)
    assert page.status().counts["failures"] == 0

    refused.write([row_entry(3), FINISH])
    refused.close()
    until(fatal, lambda: is_finished(fatal))
    assert_every_row_once(backend.runs["run2"], 4)
    assert not fatal.take_stop_request()


def _lose_the_upload_of_a_second_table(
    outbox: OutboxWriter, supervise: Supervise, backend: WandbBackend, tmp_path: Path
) -> threading.Event:
    """Kill a sink while the table of row 1 is on its way; return what lets the server's hanging request go."""
    first = supervise(backend)
    outbox.write([run_entry(), table_entry(0, "t-0")])
    first.start()
    run = backend.runs.setdefault("run1", BackendRun(name="run1"))
    until(first, lambda: len(run.history) == 1 and backend.operations["CommitArtifact"] == 1)
    landing = threading.Event()
    backend.faults["upload"] = Fault(until=landing)
    outbox.write([table_entry(1, "t-1")])
    until(first, lambda: len(run.history) == 2)
    for pid in sink_processes(tmp_path):
        os.kill(pid, signal.SIGKILL)
    first.stop(0.0)
    backend.faults.clear()
    return landing


@pytest.mark.slow
def test_a_table_whose_upload_died_with_the_worker_is_asked_for_once_more(
    outbox: OutboxWriter, supervise: Supervise, backend: WandbBackend, tmp_path: Path
) -> None:
    """Its row is at the server, its file is not, and the worker that knew of it is gone."""
    landing = _lose_the_upload_of_a_second_table(outbox, supervise, backend, tmp_path)
    run = backend.runs["run1"]
    second = supervise(backend)
    second.start()
    until(second, lambda: second.status().counts["unconfirmed_tables"] == 1)
    assert second.take_unconfirmed_tables() == (1,)
    outbox.write([table_entry(1, "t-1"), FINISH])  # what the worker does with it
    until(second, lambda: is_finished(second))
    landing.set()
    assert [row["sidecar/table_id"] for row in run.history] == ["t-0", "t-1", "t-1"]
    third = supervise(backend)
    third.start()
    until(third, lambda: third.status().state is SinkState.FINISHED)
    assert third.take_unconfirmed_tables() == ()


@pytest.mark.slow
def test_an_ended_run_waits_for_the_tables_that_have_to_be_sent_once_more(
    outbox: OutboxWriter, supervise: Supervise, backend: WandbBackend, tmp_path: Path
) -> None:
    """Its last entry was there before the sink that asks; a worker that dies then leaves the question to the next."""
    landing = _lose_the_upload_of_a_second_table(outbox, supervise, backend, tmp_path)
    outbox.write([FINISH])
    second = supervise(backend)
    second.start()
    until(second, lambda: second.status().state is SinkState.FINISHED)
    assert second.status().entries_behind == second.status().entries_unconfirmed == 1
    second.stop(0.0)

    third = supervise(backend)
    third.start()
    until(third, lambda: third.status().state is SinkState.FINISHED and third.status().pid is None)
    assert third.take_unconfirmed_tables() == (1,)
    outbox.write([table_entry(1, "t-1")])
    third.poll()
    assert third.status().entries_behind == 1
    until(third, lambda: is_finished(third))
    landing.set()
    assert [row["sidecar/table_id"] for row in backend.runs["run1"].history] == ["t-0", "t-1", "t-1"]
    starts = third.status().counts["starts"]
    third.poll()
    assert third.status().counts["starts"] == starts == 2


@pytest.mark.slow
def test_an_upload_that_is_refused_at_the_very_end_is_not_taken_for_done(
    outbox: OutboxWriter, supervise: Supervise, backend: WandbBackend
) -> None:
    """``finish`` returns as ever after HTTP 400; only the server knows how many rows it has."""
    supervisor = supervise(backend)
    outbox.write([run_entry(), row_entry(0)])
    supervisor.start()
    until(supervisor, lambda: supervisor.status().num_rows == 1)
    backend.faults["filestream"] = Fault(status=400, requests=1)
    outbox.write([row_entry(1), FINISH])
    until(supervisor, lambda: supervisor.status().counts["failures"] == 1)
    assert "rows are missing at W&B's server" in supervisor.status().complaint
    assert supervisor.status().entries_unconfirmed > 0
    until(supervisor, lambda: is_finished(supervisor))
    assert_every_row_once(backend.runs["run1"], 2)
    assert (supervisor.status().entries_unconfirmed, supervisor.status().complaint) == (0, "")
