"""A real worker process in a private folder, to be greeted, killed and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

START_SECONDS = 60.0
"""On a busy machine torch alone takes half a minute to be loaded."""


def wait_until(condition: Callable[[], object], what: str, timeout_seconds: float = START_SECONDS) -> None:
    """Return when ``condition`` holds; fails the test after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_seconds} s"
        time.sleep(0.02)


class WorkerProcess:
    """One endpoint and one journal, and the process that serves them at the moment. W&B is off unless asked for."""

    def __init__(self, *options: str, wandb_mode: str = "disabled") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ss-"))  # short: it holds a socket
        self.address = f"ipc://{self.folder}/s"
        self.out = self.folder / "out"
        self.journal = self.out / "journal"
        self.home = self.folder / "home"
        self.log = self.folder / "worker.log"
        self._options = ["--wandb-mode", wandb_mode, *options]
        self.prefix: Sequence[str] = ()
        """What the worker's own command is put behind (``ip netns exec NAME``)."""
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "sidestep.worker.cli", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SIDESTEP_HOME": str(self.home)}

    def start(self) -> None:
        """Start the process and wait until it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *self.prefix,
                    *self.command("worker", "--endpoint", self.address, "--out", str(self.out), *self._options),
                ],
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        wait_until(self._is_listening, "the worker listens", START_SECONDS)

    def _is_listening(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.text()
        try:
            said = json.loads((self.journal / "worker.json").read_text())
        except (FileNotFoundError, ValueError):
            return False
        return bool(said["pid"] == self.process.pid)

    def text(self) -> str:
        """Return all that the worker has written to its console."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL the process."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout_seconds: float = 40.0) -> int:
        """SIGTERM the process; return its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_seconds)

    def run(self, *arguments: str, timeout_seconds: float = 50.0) -> subprocess.CompletedProcess[str]:
        """Run another command of the same user."""
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=timeout_seconds,
            check=False,
        )  # fmt: skip

    def query(self, text: str, file: str = "index.sqlite") -> list[tuple[Any, ...]]:
        """Read the journal beside the worker; nothing where it is not made yet."""
        with closing(sqlite3.connect(f"file:{self.journal / file}?mode=ro", uri=True, timeout=10.0)) as connection:
            return connection.execute(text).fetchall()

    def closed_steps(self) -> list[tuple[int, int, str]]:
        """Return (attempt, step, reason) of the closings, in order."""
        return self.query("SELECT attempt, step, reason FROM step_closed ORDER BY closed_number")

    def outbox(self) -> list[tuple[str, dict[str, Any]]]:
        """Return (kind, payload) of all entries, in order."""
        rows = self.query("SELECT kind, payload FROM outbox ORDER BY run_id, position")
        return [(kind, json.loads(payload)) for kind, payload in rows]

    def remove(self) -> None:
        """End the process and delete everything."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder)
