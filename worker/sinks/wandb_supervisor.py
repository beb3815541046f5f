"""Starts, watches, kills and starts again the W&B child process; lives in the worker and never waits for it.

``poll`` is called from the worker's loop. It reads what the child has said, sees whether it lives, and whether it moves
while entries wait; everything else (rows, resuming, wandb itself) is the child's (wandb_sink.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Final, Literal

from sidestep.worker.sinks.outbox_reader import OutboxReader
from sidestep.worker.sinks.wandb_processes import MARK_VARIABLE, mark_of, marked_processes
from sidestep.worker.sinks.wandb_progress import EXIT_AGAIN, EXIT_NEVER, Progress, SinkState

_LOG: Final = logging.getLogger(__name__)

_READ_BYTES: Final = 64 * 1024
_OUTBOX_LOOK_SECONDS: Final = 0.5
_BUSY_SECONDS: Final = 0.05
_STOP_POLL_SECONDS: Final = 0.05
_MAX_POLL_GAP_SECONDS: Final = 1.0
"""A worker that got no time for longer than this (a paused container, a loaded host) does not blame its child."""
_MAX_LOG_BYTES: Final = 4 << 20
_ENDED: Final = frozenset({SinkState.FINISHED, SinkState.SUSPENDED, SinkState.DISABLED})


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbSinkConfig:
    """How one run is brought to W&B."""

    journal: Path
    """Folder of the journal, whose outbox is followed."""
    run_id: str
    out: Path
    """Folder under which W&B keeps its own files; a container keeps it on a volume at a fixed path."""
    mode: Literal["offline", "online", "disabled"] = "offline"
    rows_per_second: float = 10.0
    """Upper bound of the rate online, where W&B documents 1,000 rows a minute; 0: no limit."""
    stall_seconds: float = 60.0
    """A child that does not move for so long while entries wait is killed."""
    start_seconds: float = 60.0
    """The same for a child that has not opened its run yet: Python, wandb and the server need their time."""
    init_seconds: float = 20.0
    """How long the server may take to open the run before the child gives up, and the next one tries."""
    finish_seconds: float = 30.0
    """A child that finishes its run gives up by itself when not all is uploaded by then, and the next one goes on; it
    says nothing meanwhile, so it is killed only when it is silent for ``stall_seconds`` more."""
    backoff_first_seconds: float = 0.5
    """Wait before a dead child is started again; doubled with every death that moved nothing."""
    backoff_max_seconds: float = 60.0
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the child gets beside the worker's own."""

    def __post_init__(self) -> None:
        """Refuse what cannot work; ValueError names the field."""
        if not self.run_id:
            raise ValueError("WandbSinkConfig.run_id: must not be empty")
        patience = ("stall_seconds", "start_seconds", "init_seconds", "finish_seconds")
        for name in (*patience, "backoff_first_seconds", "backoff_max_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"WandbSinkConfig.{name}: must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbStatus:
    """Where the sink stands; a value, safe to hand to another thread."""

    state: SinkState
    pid: int | None
    position: int
    """Outbox position up to which W&B was given everything."""
    num_rows: int
    """Rows and tables that W&B was given."""
    rows_behind: int
    """Rows and tables of the outbox that W&B was not given yet."""
    entries_behind: int
    """Entries that W&B was not given yet; a table that has to be sent once more is one."""
    entries_unconfirmed: int
    """Entries that are not known to have arrived: what is uploading is among them, and what an end did not upload."""
    is_given_up: bool
    """The child met a reason that no new one can mend; ``detail`` says it."""
    complaint: str
    """What is wrong with W&B's server at the moment, or what the child last died of; empty while all is well."""
    counts: Mapping[str, int]
    """Exact counts: starts, respawns, stalls, failures, unreadable_reports, stop_requests (of the run's page),
    refused_uploads, unconfirmed_tables, unreadable_outbox (looks that failed)."""
    detail: str
    """What the child last complained of."""
    alerts_sent: int
    alerts_suppressed: int
    entries_refused: int


class WandbSupervisor:
    """Keeps one child process at work. All calls belong to one thread; ``status`` may be read from any."""

    def __init__(self, config: WandbSinkConfig) -> None:
        self._config = config
        self._reader = OutboxReader(config.journal, config.run_id, busy_seconds=_BUSY_SECONDS)
        self._mark = mark_of(config.out, config.run_id)
        self._child: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._counts: Counter[str] = Counter(
            starts=0,
            respawns=0,
            stalls=0,
            failures=0,
            unreadable_reports=0,
            stop_requests=0,
            refused_uploads=0,
            unreadable_outbox=0,
            unconfirmed_tables=0,
        )
        self._totals: Counter[str] = Counter()  # of the children before this one
        idle = SinkState.DISABLED if config.mode == "disabled" else SinkState.STARTING
        self._progress = Progress(state=idle)
        self._newest_position, self._newest_rows, self._look_at = -1, 0, 0.0
        self._polled_at = self._start_at = self._idle_seconds = 0.0
        self._backoff_seconds = config.backoff_first_seconds
        self._detail = ""
        self._is_wanted = self._stop_reported = self._is_given_up = self._is_listening = False
        self._unconfirmed: set[int] = set()
        self._status = self._current_status()

    def start(self) -> None:
        """Start the child, unless the mode is ``disabled``; a failure to start is tried again by ``poll``."""
        self._is_wanted = self._config.mode != "disabled"
        self.poll()

    def poll(self) -> None:
        """Hear the child, start or kill it as needed; never waits."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _OUTBOX_LOOK_SECONDS
            self._look_into_outbox()
        self._hear()
        if self._is_listening and not self._is_wanted and self._child is not None:
            self._child.terminate()  # more than once does no harm
        self._count_idle_time(now)
        if self._child is not None and self._child.poll() is not None:
            self._hear()
            self._bury(self._child, now)
        elif self._child is not None and self._idle_seconds > self._patience_seconds():
            self._counts["stalls"] += 1
            self._detail = f"no progress for {self._patience_seconds():g} s with {self._waiting()} entries waiting"
            _LOG.warning("the W&B sink of run %s is killed: %s", self._config.run_id, self._detail)
            self._idle_seconds = 0.0
            self._kill()
        if self._child is None and self._is_due(now):
            self._spawn(now)
        self._status = self._current_status()

    def status(self) -> WandbStatus:
        """Return how things stood at the last ``poll``."""
        return self._status

    def take_stop_request(self) -> bool:
        """Return, once, that somebody pressed "Stop run" on the run's page."""
        wanted, self._stop_reported = self._stop_reported, False
        return wanted

    def take_unconfirmed_tables(self) -> tuple[int, ...]:
        """Return, once, the row numbers of tables whose upload an earlier child may have left undone (online only).

        Their rows are in W&B, their files perhaps not. To have them at least once, append each as a new row with the
        same ``sidecar/table_id`` (docs/delivery.md, section 4).
        """
        tables = tuple(sorted(self._unconfirmed))
        self._unconfirmed.clear()
        if tables:
            self._look_at = 0.0  # they are in the outbox by the next poll, which has to see them
        return tables

    def request_stop(self) -> None:
        """Ask the child to send what waits and to end; a child that dies after this is not started again.

        One that has not said anything yet would die of the signal with nothing sent: it is asked when it has.
        """
        self._is_wanted = False
        if self._child is not None and self._is_listening:
            self._child.terminate()

    def stop(self, timeout_seconds: float) -> bool:
        """Do the same and wait for it; after the timeout the child is killed. Return whether it ended by itself."""
        self.request_stop()
        deadline = time.monotonic() + timeout_seconds
        while self._child is not None and time.monotonic() < deadline:
            self.poll()
            time.sleep(_STOP_POLL_SECONDS)
        in_time = self._child is None
        if (child := self._child) is not None:
            self._kill()
            child.wait()
            self._hear()
            self._bury(child, time.monotonic())
        self._look_into_outbox()
        self._status = self._current_status()
        self._reader.close()
        return in_time

    # ------------------------------------------------------------------------------------------------------ the child

    def _is_due(self, now: float) -> bool:
        if not self._is_wanted or self._is_given_up or now < self._start_at:
            return False
        if self._progress.state in _ENDED and self._waiting() == 0:
            return False
        return self._counts["starts"] == 0 or not marked_processes(self._mark)  # a killed wandb-core is still going

    def _spawn(self, now: float) -> None:
        config = self._config
        command = [
            sys.executable, "-m", "sidestep.worker.sinks.wandb_sink",
            "--journal", str(config.journal), "--run", config.run_id, "--out", str(config.out), "--mode", config.mode,
            "--rows-per-second", str(config.rows_per_second), "--init-seconds", str(config.init_seconds),
            "--finish-seconds", str(config.finish_seconds),
            "--owner-on-stdin",
        ]  # fmt: skip
        environment = {**os.environ, **config.environment, MARK_VARIABLE: self._mark}
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            with self._open_log() as log:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    process_group=0,
                )
        except OSError as error:
            self._counts["failures"] += 1
            self._detail = f"the W&B sink cannot be started: {error}"
            self._postpone(now)
            return
        if child.stdout is not None:
            os.set_blocking(child.stdout.fileno(), False)
        self._child, self._unread, self._is_listening = child, b"", False
        self._counts["respawns"] += self._counts["starts"] > 0
        self._counts["starts"] += 1
        self._idle_seconds = 0.0

    def _open_log(self) -> IO[bytes]:
        path = self._config.out / f"wandb-sink-{self._config.run_id}.log"
        too_long = path.is_file() and path.stat().st_size > _MAX_LOG_BYTES
        return path.open("wb" if too_long else "ab")

    def _bury(self, child: subprocess.Popen[bytes], now: float) -> None:
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        self._child = None
        code, state = child.returncode, self._progress.state
        if code == 0 and state in _ENDED:
            self._backoff_seconds = self._config.backoff_first_seconds
        else:
            self._is_given_up = code == EXIT_NEVER
            if state is SinkState.STOP_REQUESTED:
                if self._progress.complaint:  # no page, but a refusal: the next child may meet it again
                    self._postpone(now)
            else:
                self._counts["failures"] += 1
                if code != EXIT_AGAIN and not self._detail:
                    self._detail = f"the W&B sink ended with {code}"
                self._postpone(now)
        for name in ("alerts_sent", "alerts_suppressed", "entries_refused"):
            self._totals[name] += getattr(self._progress, name)
        self._progress = Progress(
            state=state if code == 0 or self._is_given_up else SinkState.STARTING,
            position=self._progress.position,
            num_rows=self._progress.num_rows,
            confirmed_position=self._progress.confirmed_position,
            complaint=self._progress.complaint,
        )

    def _postpone(self, now: float) -> None:
        self._start_at = now + self._backoff_seconds
        self._backoff_seconds = min(self._config.backoff_max_seconds, 2 * self._backoff_seconds)

    def _kill(self) -> None:
        """SIGKILL the child's group, and its wandb-core, which is in a session of its own."""
        if self._child is None:
            return
        left = marked_processes(self._mark)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # -------------------------------------------------------------------------------------------------- what it says

    def _hear(self) -> None:
        if self._child is None or self._child.stdout is None:
            return
        while True:
            try:
                read = os.read(self._child.stdout.fileno(), _READ_BYTES)
            except BlockingIOError:
                break
            if not read:
                break
            self._unread += read
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            try:
                self._heed(Progress.parse(line))
                self._is_listening = True
            except ValueError:
                self._counts["unreadable_reports"] += 1

    def _heed(self, report: Progress) -> None:
        before = self._progress
        if report.state is SinkState.STARTING:  # it does not know yet where W&B stands
            report = replace(
                report,
                position=before.position,
                num_rows=before.num_rows,
                confirmed_position=before.confirmed_position,
                complaint=before.complaint,
            )
        if (report.position, report.num_rows, report.state) != (before.position, before.num_rows, before.state):
            self._idle_seconds = 0.0
        is_well = report.confirmed_position > before.confirmed_position or report.state in _ENDED
        if report.state in _ENDED:
            report = replace(report, complaint="")  # the server has what it was to have
        if is_well:
            self._backoff_seconds = self._config.backoff_first_seconds
        if is_well or report.num_rows > before.num_rows:
            self._detail = ""
        self._detail = report.detail or self._detail
        self._unconfirmed |= set(report.tables_undone)
        self._counts["unconfirmed_tables"] += len(report.tables_undone)
        if report.state is SinkState.STOPPED_BY_PAGE:
            self._stop_reported = True
            self._counts["stop_requests"] += 1
        elif report.state is SinkState.UPLOAD_REFUSED:
            self._counts["refused_uploads"] += 1
            self._detail = "the server refused an upload for good; its rows are sent again"
        self._progress = report

    # ---------------------------------------------------------------------------------------------------- the outbox

    def _look_into_outbox(self) -> None:
        try:
            self._newest_position, self._newest_rows = self._reader.newest_position(), self._reader.num_rows()
        except sqlite3.Error as error:  # the numbers before stand until the next look
            self._counts["unreadable_outbox"] += 1
            self._detail = f"the outbox cannot be read: {error}"

    def _waiting(self) -> int:
        return max(0, self._newest_position - self._progress.position)

    def _unconfirmed_entries(self) -> int:
        return max(0, self._newest_position - self._progress.confirmed_position)

    def _count_idle_time(self, now: float) -> None:
        """Count the time that the child had something to do and did not move; before there is work, none passes."""
        gap, self._polled_at = min(now - self._polled_at, _MAX_POLL_GAP_SECONDS), now
        busy = self._waiting() > 0 or self._progress.state is SinkState.FINISHING
        self._idle_seconds = self._idle_seconds + gap if busy else 0.0

    def _patience_seconds(self) -> float:
        config, state = self._config, self._progress.state
        if state is SinkState.FINISHING:
            return config.finish_seconds + config.stall_seconds
        return config.start_seconds if state is SinkState.STARTING else config.stall_seconds

    def _current_status(self) -> WandbStatus:
        progress, totals = self._progress, self._totals
        return WandbStatus(
            state=progress.state,
            pid=None if self._child is None else self._child.pid,
            position=progress.position,
            num_rows=progress.num_rows,
            rows_behind=max(0, self._newest_rows - progress.num_rows),
            entries_behind=self._waiting() + len(self._unconfirmed),
            entries_unconfirmed=self._unconfirmed_entries() + len(self._unconfirmed),
            is_given_up=self._is_given_up,
            complaint=progress.complaint or self._detail,
            counts=dict(self._counts),
            detail=self._detail,
            alerts_sent=totals["alerts_sent"] + progress.alerts_sent,
            alerts_suppressed=totals["alerts_suppressed"] + progress.alerts_suppressed,
            entries_refused=totals["entries_refused"] + progress.entries_refused,
        )
