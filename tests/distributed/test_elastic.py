"""torchrun's elastic agents: ranks that die, that join, that stand still. One worker, one run, no row twice."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.rank_processes import free_port
from tests.support.run_balance import rows_of
from tests.support.torchrun import AGENT, Launches, RankLog, query, rank_logs
from tests.support.worker_process import WorkerProcess, wait_until

TRAINER = str(Path(__file__).with_name("elastic_training.py"))
HOOK_SECONDS = 1.0
"""Far above what a hook takes, far below what waiting for a rank that stands still would take."""

pytestmark = pytest.mark.timeout(280)


@pytest.fixture
def short() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ss-"))  # short: it holds a socket
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess("--trainer-silence-seconds", "4", "--assembly-deadline-seconds", "2")
    made.start()
    yield made
    made.remove()


def agent(*options: str, ranks: int = 2) -> list[str]:
    """A launch whose agents meet on this host; each call is another one."""
    place = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    return [*AGENT, f"--nproc-per-node={ranks}", *place, *options, TRAINER]


def check_rows(journal: Path, run_id: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Each value stands once per attempt and step; return the rows by these."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    seen: Counter[tuple[int, int, str]] = Counter()
    for row in rows_of(journal, run_id):
        if "train/step" not in row:
            continue
        place = int(row.get("train/attempt", 0)), int(row["train/step"])
        seen.update((*place, name) for name in row if name.startswith(("loss/", "tokens/", "lr/")))
        found.setdefault(place, {}).update(row)
    assert not [key for key, times in seen.items() if times > 1]
    closed = query(journal, "SELECT attempt, step FROM step_closed WHERE reason != 'tail'")
    assert len(closed) == len(set(closed))
    return found


def started(out: Path, world: int, *, number: int = 1) -> list[RankLog]:
    """The processes that have trained in a world of so many ranks for so many steps at least."""
    return [log for log in rank_logs(out) if log.head.get("world") == world and len(log.steps) >= number]


def test_a_rank_that_dies_is_started_again_and_its_run_goes_on(short: Path) -> None:
    """Nothing is named and nothing is kept: the same agent means the same worker, and the same run."""
    out, die = short / "out", short / "die"
    out.mkdir()
    home = {"SIDESTEP_HOME": str(short / "home"), "SIDESTEP_RUNTIME": str(short / "sockets")}
    with Launches({**home, "WANDB_MODE": "disabled"}) as launches:
        launches.start(
            [
                *agent("--max-restarts=3"),
                str(out),
                "--dies-when",
                str(die),
            ]
        )
        runs = short / "home" / "runs"
        launches.until(lambda: len(_closed(runs)) >= 3, "the first start's steps are stored")
        die.touch()
        launches.wait()
        folders = [folder for folder in runs.iterdir() if (folder / "journal" / "index.sqlite").exists()]
        assert len(folders) == 1, "one worker has served both starts"
        journal = folders[0] / "journal"
        launches.until(lambda: len(query(journal, "SELECT attempt FROM ending")) >= 2, "both attempts have ended")
        known = query(journal, "SELECT DISTINCT run_id FROM incarnation")
        logs = rank_logs(out)
        assert len({log.pid for log in logs}) >= 4, "all ranks were started again"
        assert {log.head["run"] for log in logs if log.head} == {known[0][0]}
        assert len(known) == 1
        rows = check_rows(journal, known[0][0])
        attempts = sorted({attempt for attempt, _ in rows})
        assert attempts == list(range(len(attempts)))
        assert len(attempts) >= 2
        last = attempts[-1]
        assert [step for attempt, step in sorted(rows) if attempt == last] == list(range(12))
        assert {row["train/attempt"] for (attempt, _), row in rows.items() if attempt == last} == {last}
        assert _hook_seconds(logs) < HOOK_SECONDS
        endings = query(journal, "SELECT attempt, exit_code FROM ending ORDER BY attempt")
        assert endings[-1] == (last, 0)
        assert all(code for _, code in endings[:-1])


def _closed(runs: Path) -> list[tuple[Any, ...]]:
    if not runs.exists():
        return []
    return [row for folder in runs.iterdir() for row in query(folder / "journal", "SELECT step FROM step_closed")]


def _hook_seconds(logs: list[RankLog]) -> float:
    return max(float(step["hooks"]) for log in logs for step in log.steps)


def test_a_second_node_joins_and_a_resumed_checkpoint_goes_on_in_the_same_run(
    worker: WorkerProcess, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    options = ["--nnodes=1:2", "--max-restarts=3", "--rdzv-id=grows", "--rdzv-conf=last_call_timeout=1,join_timeout=60"]
    command = [*agent(*options, ranks=1), str(out), "--grows", "--checkpoint"]
    with Launches({"SIDESTEP_ENDPOINT": worker.address}) as launches:
        launches.start(command)
        launches.until(lambda: started(out, 1, number=10), "the first node trains alone")
        launches.until(lambda: len(worker.closed_steps()) >= 5, "its steps are stored")
        launches.start(command)
        launches.wait()
    wait_until(lambda: len(worker.query("SELECT attempt FROM ending")) == 2, "both attempts have ended", 30.0)
    logs = rank_logs(out)
    alone, together = started(out, 1), started(out, 2)
    assert len(together) == 2
    assert len({log.head["run"] for log in together}) <= 2
    runs = worker.query("SELECT DISTINCT run_id FROM incarnation")
    assert len(runs) == 1, "the checkpoint's run, on both nodes"
    worlds = worker.query("SELECT attempt, world_size FROM incarnation ORDER BY attempt")
    assert worlds == [(0, 1), (1, 2)]
    rows = check_rows(worker.journal, runs[0][0])
    first = together[0].head["first"]
    assert first > 0
    assert [step for attempt, step in sorted(rows) if attempt == 1] == list(range(first, first + 12))
    assert all(row.get("sidecar/ranks_seen") is None for (attempt, _), row in rows.items() if attempt == 1)
    before = [step for attempt, step in sorted(rows) if attempt == 0]
    assert before == list(range(len(before))), "no hole before"
    assert len(before) <= max(len(log.steps) for log in alone) + 1
    assert _hook_seconds(logs) < HOOK_SECONDS


def test_a_rank_that_stands_still_holds_nobody_up_and_is_counted(worker: WorkerProcess, tmp_path: Path) -> None:
    out, enough = tmp_path / "out", tmp_path / "enough"
    out.mkdir()
    with Launches({"SIDESTEP_ENDPOINT": worker.address}) as launches:
        launches.start([*agent(), str(out), "--alone", "--until", str(enough)])
        launches.until(lambda: len(started(out, 2, number=10)) == 2, "both train")
        launches.until(lambda: len(worker.closed_steps()) >= 5, "their steps are stored")
        stopped = next(log for log in rank_logs(out) if log.rank == 1)
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            reached = max(log.steps[-1]["step"] for log in rank_logs(out))
            launches.until(
                lambda: max(step for _, step, _ in worker.closed_steps()) > reached + 20,
                "the other's steps close without it, the deadline after they came",
            )
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        time.sleep(0.5)
        enough.touch()
        launches.wait()
    wait_until(lambda: worker.query("SELECT attempt FROM ending"), "the run has ended", 30.0)
    logs = {log.rank: log for log in rank_logs(out)}
    assert worker.query("SELECT attempt, tail_unknown FROM ending") == [(0, 0)]
    (run_id,) = {log.head["run"] for log in logs.values()}
    rows = check_rows(worker.journal, run_id)
    newest = max(log.steps[-1]["step"] for log in logs.values())
    assert sorted(rows) == [(0, step) for step in range(newest + 1)]
    alone = [step for (_, step), row in sorted(rows.items()) if row.get("sidecar/ranks_seen") == 1]
    assert len(alone) >= 10, "steps say that they closed without a rank"
    assert max(step["hooks"] for step in logs[0].steps) < HOOK_SECONDS
    assert logs[0].failures == {}
    late = sum(row.get("sidecar/late_parts", 0) for row in rows.values())
    assert late > 0, "what came after the stop is counted"
