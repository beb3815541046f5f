"""The parts of the W&B sink that need no W&B: marks, pace, reports, processes, the trainer's pid."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.worker.sinks.wandb_follow import Pace
from sidestep.worker.sinks.wandb_marks import Marks
from sidestep.worker.sinks.wandb_opening import run_settings, trainer_pid
from sidestep.worker.sinks.wandb_processes import MARK_VARIABLE, SinkLock, end_marked, mark_of, marked_processes
from sidestep.worker.sinks.wandb_progress import Progress, SinkState


def test_marks_survive(tmp_path: Path) -> None:
    path = tmp_path / "marks.json"
    marks = Marks.load(path)
    assert marks.begin_alert("i1", 4)
    assert marks.begin_alert("i2", 5)
    marks.confirm_alerts(["i2", "never tried"])
    marks.finished_position = 9
    marks.save()
    again = Marks.load(path)
    assert again == marks
    assert (again.alert_attempts, again.alerts_sent, again.finished_position) == ({"i1": 1}, {"i2"}, 9)
    assert list(tmp_path.iterdir()) == [path]


def test_an_alert_is_tried_three_times_and_no_more_once_it_arrived(tmp_path: Path) -> None:
    marks = Marks.load(tmp_path / "marks.json")
    assert [marks.begin_alert("i1", 0) for _ in range(4)] == [True, True, True, False]
    marks.confirm_alerts(["i1"])
    assert not Marks.load(tmp_path / "marks.json").begin_alert("i1", 0)


def test_an_alert_before_a_row_that_arrived_has_arrived(tmp_path: Path) -> None:
    marks = Marks.load(tmp_path / "marks.json")
    for incident_id, next_row in (("i1", 3), ("i2", 4), ("i3", 5)):
        marks.begin_alert(incident_id, next_row)
    marks.confirm_alerts_before(4)  # W&B has rows 0 to 3
    assert marks.alerts_sent == {"i1"}


@pytest.mark.parametrize("content", ["{}", "[1]", '{"alerts_sent": [], "other": 1}', "no json"])
def test_a_file_that_holds_no_marks_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "marks.json").write_text(content)
    with pytest.raises(ValueError):  # noqa: PT011
        Marks.load(tmp_path / "marks.json")


def test_the_pace_lets_a_burst_through_and_then_the_rate() -> None:
    pace = Pace(rows_per_second=10.0, burst_rows=3.0)
    assert [pace.wait_seconds(100.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert pace.wait_seconds(100.0) == pytest.approx(0.1)
    assert pace.wait_seconds(100.05) == pytest.approx(0.05)
    assert pace.wait_seconds(100.1001) == 0.0
    assert pace.wait_seconds(100.1002) > 0.09
    taken = sum(pace.wait_seconds(101.0 + tick / 100) == 0.0 for tick in range(1000))
    assert 100 <= taken <= 103
    assert {Pace(rows_per_second=0.0).wait_seconds(1.0) for _ in range(100)} == {0.0}


def test_a_report_is_one_line() -> None:
    report = Progress(state=SinkState.RUNNING, position=4, num_rows=2, tables_undone=(1,), detail="two\nlines ⚠️")
    assert report.line().count(b"\n") == 1
    assert Progress.parse(report.line()) == report


@pytest.mark.parametrize("line", [b"wandb: noise", b"{}", b"[]", b'{"state": "odd", "tables": []}', b"\xff"])
def test_noise_is_no_report(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Progress.parse(line)


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, MARK_VARIABLE: mark_of(tmp_path, "run1")}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment) as child:
        while not Path(f"/proc/{child.pid}/environ").read_bytes():  # empty until the program is loaded
            time.sleep(0.01)
        yield child
        child.kill()


def test_marked_processes_are_found_and_ended(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert marked_processes(mark_of(tmp_path, "run1")) == {sleeper.pid}
    assert marked_processes(mark_of(tmp_path, "run")) == set()
    assert end_marked(mark_of(tmp_path, "run2"), 1.0) == set()
    assert sleeper.poll() is None
    assert end_marked(mark_of(tmp_path, "run1"), 10.0) == set()
    assert sleeper.wait(timeout=10) == -9


def test_one_holds_the_lock_at_a_time(tmp_path: Path) -> None:
    first, second = SinkLock(tmp_path / "lock"), SinkLock(tmp_path / "lock")
    assert first.try_take()
    assert not second.try_take()
    first.close()
    assert second.try_take()
    second.close()


def test_the_trainers_process_is_known_by_host_and_command_line(sleeper: subprocess.Popen[bytes]) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    here = {"host": socket.gethostname(), "pid": sleeper.pid, "command": command}
    assert trainer_pid(here) == sleeper.pid
    assert trainer_pid({**here, "command": [*command[:2], "***"]}) == sleeper.pid
    assert trainer_pid({**here, "command": [*command, "more"]}) is None
    assert trainer_pid({**here, "command": ["python", "train.py", "x"]}) is None
    assert trainer_pid({**here, "host": "another"}) is None
    assert trainer_pid({**here, "pid": 2**22 + 1}) is None
    assert trainer_pid({}) is None
    settings = run_settings({"environment": here}, finish_seconds=7.0)
    assert (settings["x_stats_pid"], settings["x_disable_stats"], settings["host"]) == (
        sleeper.pid,
        False,
        here["host"],
    )
    assert run_settings({}, finish_seconds=7.0)["x_disable_stats"] is True
