"""The worker process beside a command: started, kept alive, drained; a socket is all that the two share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from typing import Final

from sidestep.worker.config import WorkerConfig, flag_name
from sidestep.worker.errors import WorkerError
from sidestep.worker.home import WORKER_FILE

_START_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.05
_FIRST_BACKOFF_SECONDS: Final = 0.5
_LONGEST_BACKOFF_SECONDS: Final = 10.0
_GRACE_SECONDS: Final = 20.0
_SHOWN_LOG_CHARACTERS: Final = 2_000


class Companion:
    """One worker, started again on the same journal and endpoint whenever it dies."""

    def __init__(self, config: WorkerConfig) -> None:
        """Take options whose ``out`` and ``journal`` are given."""
        if config.out is None or config.journal is None:
            raise ValueError("a companion needs to know where it writes")
        self._config = config
        self._log = config.out / "worker.log"
        self._marker = config.journal / WORKER_FILE
        self._process: subprocess.Popen[bytes] | None = None
        self._backoff_seconds = _FIRST_BACKOFF_SECONDS
        self._start_at = 0.0
        self.restarts = 0
        """How often it was started again."""

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "sidestep.worker.cli", "worker"]
        for option in fields(WorkerConfig):
            value = getattr(self._config, option.name)
            if isinstance(value, bool):
                command += [flag_name(option.name)] if value else []
            elif value not in {"", None}:
                command += [flag_name(option.name), str(value)]
        return command

    def _spawn(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def start(self) -> None:
        """Start the worker and wait until it listens.

        Raises:
            WorkerError: it ended instead, or did not get so far in time.
        """
        self._spawn()
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self._process is not None and time.monotonic() < deadline:
            if self._is_ready(self._process.pid):
                return
            if self._process.poll() is not None:
                raise WorkerError(f"the worker could not start:\n{self._last_log()}")
            time.sleep(_POLL_SECONDS)
        raise WorkerError(f"the worker did not listen within {_START_SECONDS:.0f} s:\n{self._last_log()}")

    def _is_ready(self, pid: int) -> bool:
        try:
            return bool(json.loads(self._marker.read_text(encoding="utf-8")).get("pid") == pid)
        except (FileNotFoundError, ValueError):
            return False  # not written yet

    def _last_log(self) -> str:
        try:
            return self._log.read_text(encoding="utf-8", errors="replace")[-_SHOWN_LOG_CHARACTERS:].strip()
        except OSError as error:
            return f"(its log {self._log} cannot be read: {error})"

    def keep_alive(self, now: float) -> None:
        """Start the worker again where it has died, later and later where it dies at once."""
        if self._process is None or self._process.poll() is None or now < self._start_at:
            return
        self._note(f"the worker ended with {self._process.returncode}; it is started again on the same journal")
        self._start_at = now + self._backoff_seconds
        self._backoff_seconds = min(2 * self._backoff_seconds, _LONGEST_BACKOFF_SECONDS)
        self.restarts += 1
        self._spawn()

    def _note(self, text: str) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def finish(self) -> bool:
        """Let the worker bring everything home and end; return whether it did, in time.

        A worker that died at the end is started once more, to read the rest from its journal.
        """
        if self._process is None:
            return False
        if self._process.poll() is not None:
            self._note(f"the worker ended with {self._process.returncode}; it is started again to deliver the rest")
            self.restarts += 1
            self._spawn()
        try:
            self._wait_until_ready()  # before that, SIGTERM would end it without a look at its journal
            self._process.send_signal(signal.SIGTERM)
            return self._process.wait(self._config.sink_drain_seconds + _GRACE_SECONDS) == 0
        except (WorkerError, subprocess.TimeoutExpired) as error:
            self._note(str(error))
            return False

    def end(self) -> None:
        """Make sure that no worker is left behind."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
