"""A training in a process of its own, watched from the test: its steps, its end, and what it was told to train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from tests.support.worker_process import WorkerProcess, wait_until

ROOT = Path(__file__).resolve().parents[2]
HARD_SECONDS = 60.0


class FaultsTraining:
    """One process of ``tests.support.faults_training``; ends with the test."""

    def __init__(
        self,
        folder: Path,
        endpoint: str,
        *options: str,
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.out = folder / "steps.jsonl"
        self.stop_file = folder / "stop"
        self.stderr = folder / "stderr"
        command = [
            *prefix, sys.executable, "-m", "tests.support.faults_training", str(self.out),
            "--endpoint", endpoint, "--until", str(self.stop_file), *options,
        ]  # fmt: skip
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, stderr=stderr, stdout=stderr, cwd=ROOT, env={**os.environ, **(environment or {})}
            )

    def lines(self) -> list[dict[str, Any]]:
        """Return what it has written, whole lines only."""
        if not self.out.exists():
            return []
        return [json.loads(line) for line in self.out.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if "loss" in line]

    def wait_for_steps(self, num_more: int) -> int:
        """Return the number of steps once ``num_more`` have ended from now on: the training is not held up."""
        wanted = len(self.steps()) + num_more
        wait_until(lambda: self._is_running() and len(self.steps()) >= wanted, f"{wanted} steps", HARD_SECONDS)
        return len(self.steps())

    def _is_running(self) -> bool:
        assert self.process.poll() is None, self.said()
        return True

    def stop(self) -> dict[str, Any]:
        """Let it end by itself; return its last line."""
        self.stop_file.touch()
        assert self.process.wait(HARD_SECONDS) == 0, self.said()
        last = self.lines()[-1]
        assert last["ended"]
        return last

    def kill(self) -> None:
        """SIGKILL it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        """Return all that it wrote to its console."""
        return self.stderr.read_text(errors="replace")

    def assert_unharmed(self, *, num_steps: int) -> None:
        """Hold its losses, bit for bit, against those of a training without hooks; nothing was raised."""
        losses = [step["loss"] for step in self.steps()]
        assert len(losses) >= num_steps
        assert losses == control_losses(len(losses))
        assert "Traceback" not in self.said()


@cache
def _control(num_steps: int) -> list[str]:
    folder = Path(os.environ["WANDB_DIR"])  # the session's own
    out = folder / f"control-{os.getpid()}-{num_steps}.jsonl"
    command = [sys.executable, "-m", "tests.support.faults_training", str(out), "--steps", str(num_steps)]
    subprocess.run([*command, "--step-seconds", "0"], check=True, timeout=HARD_SECONDS, cwd=ROOT)
    return [json.loads(line)["loss"] for line in out.read_text().splitlines()[:-1]]


def control_losses(num_steps: int) -> list[str]:
    """Return the losses of the first ``num_steps`` steps without hooks."""
    longest = -(-num_steps // 250) * 250  # one control serves many trainings
    return _control(longest)[:num_steps]


def closed_steps(worker: WorkerProcess) -> dict[int, str]:
    """Return step to why it was closed, in order; empty while there is no journal yet."""
    if not (worker.journal / "worker.json").exists():
        return {}
    return {step: reason for _, step, reason in worker.closed_steps()}


def assert_all_arrived(worker: WorkerProcess, training: FaultsTraining) -> None:
    """The worker has closed every step of the training, whole, once, in order."""
    num_steps = len(training.steps())
    wait_until(lambda: len(closed_steps(worker)) >= num_steps, "all steps closed")
    assert closed_steps(worker) == dict.fromkeys(range(num_steps), "complete")


@contextmanager
def a_worker() -> Iterator[WorkerProcess]:
    """A worker that is not started yet, gives a vanished trainer up soon, and ends with the block, stopped or not."""
    made = WorkerProcess("--trainer-silence-seconds", "1")
    try:
        yield made
    finally:
        if made.process is not None:
            made.process.send_signal(signal.SIGCONT)
        made.remove()


@contextmanager
def trainings(folder: Path) -> Iterator[MakeTraining]:
    """Make trainings that end with the block."""
    made: list[FaultsTraining] = []

    def make(endpoint: str, *options: str, **settings: Any) -> FaultsTraining:
        made.append(FaultsTraining(folder, endpoint, *options, **settings))
        return made[-1]

    try:
        yield make
    finally:
        for training in made:
            training.kill()


MakeTraining: TypeAlias = Callable[..., FaultsTraining]
"""(endpoint, options of ``faults_training``, ``prefix`` and ``environment``) to a training that runs."""
