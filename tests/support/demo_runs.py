"""Runs of the demo as a user starts them, and a worker killed in the middle of one."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

MODULE = ("-m", "sidestep.examples.digits_vqa")


def demo_command(out: Path, *options: str) -> list[str]:
    """Return the demo's training command, which leaves losses and the weights' hash in ``out``."""
    return [sys.executable, *MODULE, "--threads", "1", "--out", str(out), *options]


def with_worker(out: Path, command: list[str]) -> list[str]:
    """Return ``command`` under ``sidestep run``."""
    return [sys.executable, "-m", "sidestep.worker.cli", "run", "--out", str(out), "--", *command]


def finished(process: subprocess.Popen[str], timeout_seconds: float) -> str:
    """Wait for a run to end well and return what it printed.

    Raises:
        AssertionError: it failed; the text is what it printed.
    """
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate(timeout=30)
        raise AssertionError(f"still running after {timeout_seconds} s:\n{output}") from None
    assert process.returncode == 0, output
    return output


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a run; both of its streams are one."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def training_summary(out: Path) -> dict[str, Any]:
    """Return what the demo wrote: ``losses``, ``accuracy``, ``weights_sha256``."""
    value: dict[str, Any] = json.loads((out / "training.json").read_text(encoding="utf-8"))
    return value


def wait_for_closed_steps(journal: Path, num_steps: int, timeout_seconds: float) -> None:
    """Return when the worker has closed ``num_steps`` steps.

    Raises:
        AssertionError: it has not in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if num_closed_steps(journal) >= num_steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"{num_closed_steps(journal)} steps closed after {timeout_seconds} s, {num_steps} wanted")


def num_closed_steps(journal: Path) -> int:
    """Return how many steps a journal has closed; 0 while it is being made."""
    index = journal / "index.sqlite"
    if not index.is_file():
        return 0
    try:
        with closing(sqlite3.connect(f"{index.as_uri()}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM step_closed").fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # its tables are not made yet


def kill_worker(journal: Path) -> int:
    """Kill the worker of a journal and every process of its group with SIGKILL; return its process id."""
    pid = int(json.loads((journal / "worker.json").read_text(encoding="utf-8"))["pid"])
    os.kill(pid, signal.SIGKILL)
    return pid
