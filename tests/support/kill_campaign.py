"""Kill -9 of a real worker, again and again, while a real publisher goes on; and what is there at the end.

Each kill takes the worker alone, whose W&B child and wandb-core go on for a while as orphans, or the whole tree of the
three. The worker is started again at once on the same journal, as ``sidestep run`` does it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.support.kill_counts import Counts, Expected, count_journal, count_offline, count_online, count_replay
from tests.support.steady_publisher import INCARNATION, RESULT_FILE, RUN_ID, STOP_FILE
from tests.support.wandb_backend import WandbBackend
from tests.support.wandb_offline import read_fragments
from tests.support.wandb_supervising import sync_fragments
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.worker.health import ask_health
from sidestep.worker.sinks.wandb_processes import mark_of, marked_processes

ROOT = Path(__file__).parents[2]
_SMALL_GAP_SECONDS, _LARGE_GAP_SECONDS = 0.1, 3.0


@dataclass(frozen=True, kw_only=True)
class KillPlan:
    """What is done to the worker."""

    mode: str = "offline"
    """Of W&B: ``online`` (at a loopback backend) or ``offline``."""
    kills: int = 100
    seed: int = 0
    steps_per_second: float = 50.0
    tree_share: float = 0.5
    """Share of the kills that take the W&B child and wandb-core as well."""
    settle_seconds: float = 300.0
    """How long the last worker may take to bring everything home."""
    sync: bool = True
    """Offline: bring the fragments to a backend by ``wandb sync``, and count there too."""


class TunedWorker(WorkerProcess):
    """A worker with variables of its own."""

    def __init__(self, *options: str, wandb_mode: str, variables: dict[str, str]) -> None:
        super().__init__(*options, wandb_mode=wandb_mode)
        self._variables = variables

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, **self._variables}

    def sink_processes(self, run_id: str = RUN_ID) -> set[int]:
        """Return the W&B child and its wandb-core, orphans included."""
        return marked_processes(mark_of(self.out, run_id))

    def kill_tree(self, run_id: str = RUN_ID) -> None:
        """SIGKILL the worker, its W&B child and wandb-core."""
        others = self.sink_processes(run_id)
        self.kill()
        for pid in others | self.sink_processes(run_id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def health(self) -> dict[str, Any]:
        """Return what ``/healthz`` says."""
        return ask_health(self.journal)

    def wandb_status(self, run_id: str = RUN_ID) -> dict[str, Any]:
        """Return the state of a run's W&B sink as ``/healthz`` says it; empty where it has none."""
        found: dict[str, Any] = self.health().get("sinks", {}).get("wandb", {}).get(run_id, {})
        return found

    def has_delivered(self, run_id: str = RUN_ID) -> bool:
        """Whether W&B has all of a run that has ended."""
        status = self.wandb_status(run_id)
        return status.get("state") == "finished" and not status["entries_behind"] and status["pid"] is None


def start_publisher(address: str, folder: Path, steps_per_second: float = 50.0) -> subprocess.Popen[bytes]:
    """Start the steady publisher; ``stop_publisher`` ends it."""
    command = [sys.executable, "-m", "tests.support.steady_publisher", address, str(folder)]
    with (folder / "publisher.log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--steps-per-second", str(steps_per_second)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))},
        )


def stop_publisher(process: subprocess.Popen[bytes], folder: Path, timeout_seconds: float = 90.0) -> dict[str, Any]:
    """Let the publisher close; return what it left."""
    (folder / STOP_FILE).touch()
    process.wait(timeout_seconds)
    assert process.returncode == 0, (folder / "publisher.log").read_text()
    found: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text())
    return found


def run_campaign(plan: KillPlan, say: Callable[[str], None]) -> dict[str, Any]:
    """Kill, restart, let everything come home, count. ``wrong`` of the result names each count that is not right."""
    with WandbBackend() as backend:
        variables = {"SIDESTEP_WANDB_ROWS_PER_SECOND": "0", **backend.environment, "WANDB_MODE": plan.mode}
        worker = TunedWorker(wandb_mode=plan.mode, variables=variables)
        try:
            return _run(plan, worker, backend, say)
        finally:
            worker.kill_tree()
            worker.remove()


def _run(plan: KillPlan, worker: TunedWorker, backend: WandbBackend, say: Callable[[str], None]) -> dict[str, Any]:
    begin = time.monotonic()
    worker.start()
    publisher = start_publisher(worker.address, worker.folder, plan.steps_per_second)
    try:
        killed = _kill(plan, worker, say)
        published = stop_publisher(publisher, worker.folder)
    finally:
        if publisher.poll() is None:
            publisher.kill()
            publisher.wait()
    say(f"published {published['steps']} steps in {time.monotonic() - begin:.0f} s")
    wait_until(worker.has_delivered, f"W&B has all: {worker.wandb_status()}", plan.settle_seconds)
    status = worker.wandb_status()
    exit_code = worker.terminate()
    say("everything is delivered; counting")
    result: dict[str, Any] = {
        "plan": asdict(plan), "killed": dict(killed), "published": published, "exit_code": exit_code,
        "seconds": time.monotonic() - begin, "last_sink": status,
    }  # fmt: skip
    counts = _count(plan, worker, backend, published)
    wrong = [f"{name}.{problem}" for name, each in counts.items() for problem in each.wrong()]
    wrong += [] if exit_code == 0 else [f"the last worker ended with {exit_code}"]
    return {**result, "counts": {name: asdict(each) for name, each in counts.items()}, "wrong": wrong}


def _kill(plan: KillPlan, worker: TunedWorker, say: Callable[[str], None]) -> Counter[str]:
    chance, killed = random.Random(plan.seed), Counter[str]()
    for number in range(plan.kills):
        time.sleep(chance.uniform(_SMALL_GAP_SECONDS, _LARGE_GAP_SECONDS))
        if chance.random() < plan.tree_share:
            worker.kill_tree()
            killed["tree"] += 1
        else:
            worker.kill()
            killed["worker"] += 1
        worker.start()
        if (number + 1) % 10 == 0:
            say(f"{number + 1} kills, {len(worker.closed_steps())} steps closed")
    return killed


def _count(plan: KillPlan, worker: TunedWorker, backend: WandbBackend, published: dict[str, Any]) -> dict[str, Counts]:
    expected = Expected.read(worker.journal, RUN_ID)
    counts = {"journal": count_journal(worker.journal, expected, published, INCARNATION)}
    if plan.mode == "online":
        counts["online"] = count_online(expected, backend, RUN_ID)
    else:
        counts["offline"] = count_offline(expected, read_fragments(worker.out))
        if plan.sync:
            sync_fragments(worker.out, backend, timeout_seconds=plan.settle_seconds)
            counts["synced"] = count_online(expected, backend, RUN_ID)
    again = worker.folder / "again"
    done = worker.run("replay", str(worker.journal), "--out", str(again), timeout_seconds=plan.settle_seconds)
    counts["replay"] = count_replay(expected, again, is_identical=done.returncode == 0)
    return counts
