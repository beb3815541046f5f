"""Kill -9 of the worker in the middle of the demo: every step once, none twice, and a replay gives the same rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.demo_runs import (
    demo_command,
    finished,
    kill_worker,
    num_closed_steps,
    start,
    training_summary,
    wait_for_closed_steps,
    with_worker,
)
from tests.support.wandb_offline import read_fragments

NUM_STEPS = 30

pytestmark = pytest.mark.timeout(240)


def test_the_run_holds_every_step_once_after_two_kills(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    intervals = ("--generation-interval", "5", "--collapse-interval", "5")
    run = start(with_worker(tmp_path, demo_command(tmp_path, "--steps", str(NUM_STEPS), *intervals)))
    killed = []
    for num_closed in (4, 15):
        wait_for_closed_steps(journal, num_closed, 100)
        killed.append(kill_worker(journal))
    finished(run, 150)
    assert len(set(killed)) == 2, "the worker was restarted in between"
    assert len(training_summary(tmp_path)["losses"]) == NUM_STEPS
    assert num_closed_steps(journal) >= NUM_STEPS

    rows = [row for row in read_fragments(tmp_path).rows if "sidecar/table_id" not in row]
    generated = [int(row["train/step"]) for row in rows if "generation/avg_length" in row]
    assert generated == list(range(0, NUM_STEPS, 5))
    steps = [int(row["train/step"]) for row in rows]
    assert len(steps) == len(set(steps)), "no step has two rows"

    command = [sys.executable, "-m", "sidestep.worker.cli", "replay", str(journal), "--out", str(tmp_path / "again")]
    replayed = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    again = [row for row in read_fragments(tmp_path / "again").rows if "sidecar/table_id" not in row]
    assert [{k: v for k, v in row.items() if k not in ("_step", "_runtime")} for row in again] == [
        {k: v for k, v in row.items() if k not in ("_step", "_runtime")} for row in rows
    ]
