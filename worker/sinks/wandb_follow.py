"""Follows a run's outbox into a W&B run: which entry is sent, which was sent before, and when the run ends.

Nothing here knows wandb: the run is a ``TrackedRun``, which wandb_sink.py makes. Row number k of the outbox is W&B's
``_step`` k, so what an earlier child sent is known from where W&B stands, never from what was handed over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sidestep.worker.outbox import StoredEntry
from sidestep.worker.sinks.outbox_reader import OutboxReader
from sidestep.worker.sinks.wandb_marks import Marks
from sidestep.worker.sinks.wandb_progress import Progress, SinkState
from sidestep.worker.sinks.wandb_server import ServerRun
from sidestep.worker.sinks.wandb_tables import undone_tables

_LOG: Final = logging.getLogger(__name__)

_BATCH_ENTRIES: Final = 100
_POLL_SECONDS: Final = 0.2
_REPORT_SECONDS: Final = 0.25
_MAX_REASON_CHARACTERS: Final = 500
_BEAT_SECONDS: Final = 5.0
_ALERT_SETTLE_SECONDS: Final = 5.0
_FLOOD_SECONDS: Final = 60.0
_MAX_FLOOD_ALERTS: Final = 20
_MAX_END_ATTEMPTS: Final = 3
"""After so many the run's end is believed although the server, which has every row, still shows the run as going on."""


class ForeignRowsError(Exception):
    """W&B's run and the outbox do not belong together; sending on would put rows under wrong steps."""


class RefusedValueError(Exception):
    """An entry's values cannot be told to W&B, now or later; nothing of it was logged."""


class UndeliveredError(Exception):
    """W&B's server does not have what it was given; a new child sends it again."""


class TrackedRun(Protocol):
    """A W&B run that is open."""

    @property
    def next_row(self) -> int:
        """The ``_step`` that W&B gives to the next row."""

    def log_row(self, row: Mapping[str, Any]) -> None:
        """Log one row; raises RefusedValueError."""

    def log_table(self, table: Mapping[str, Any], row_number: int) -> None:
        """Log one table as one row; raises RefusedValueError."""

    @property
    def is_online(self) -> bool:
        """Whether a server takes rows and tables apart; offline a whole row has its table before it."""

    def take_uploaded_tables(self) -> set[int]:
        """Return, once, the rows whose tables have arrived with their files."""

    @property
    def heard_rows(self) -> int | None:
        """Rows that the server had when it was last heard; None where there is none (offline), or nothing was heard."""

    @property
    def complaint(self) -> str:
        """What is wrong between wandb-core and the server at the moment."""

    def ask_server(self) -> ServerRun | None:
        """Ask the server for the run; None offline. Raises where it does not answer."""

    def alert(self, title: str, text: str, level: str) -> None:
        """Send an alert."""

    def log_line(self, text: str) -> None:
        """Add a line to the run's log."""

    def wait_for_core(self) -> None:
        """Return when wandb-core has taken everything that was logged so far; raises where it does not answer."""

    def finish(self, exit_code: int) -> None:
        """Finish the run and wait for its uploads."""

    def suspend(self) -> None:
        """Upload what there is and leave the run to be resumed."""


@dataclass(slots=True, kw_only=True)
class Pace:
    """A bucket of permits for rows: ``rows_per_second`` on average, ``burst_rows`` at once; 0: no limit."""

    rows_per_second: float
    burst_rows: float = 20.0
    _permits: float = 0.0
    _refilled_at: float = 0.0

    def wait_seconds(self, now: float) -> float:
        """Take a permit and return 0.0, or return how long it takes until there is one."""
        if self.rows_per_second <= 0:
            return 0.0
        if not self._refilled_at:
            self._permits = self.burst_rows
        else:
            earned = (now - self._refilled_at) * self.rows_per_second
            self._permits = min(self.burst_rows, self._permits + earned)
        self._refilled_at = now
        if self._permits >= 1.0:
            self._permits -= 1.0
            return 0.0
        return (1.0 - self._permits) / self.rows_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What others want of the child; each is set from another thread, never from a signal's handler."""

    stop: threading.Event
    """Send what the outbox holds, then end."""
    orphaned: threading.Event
    """The worker is gone: end now, so that the next worker's child may begin."""
    stop_run: threading.Event
    """W&B wants the run stopped."""


class Follower:
    """Sends the entries of one outbox, in order, until the run ends or the child is asked to stop."""

    def __init__(
        self,
        reader: OutboxReader,
        run: TrackedRun,
        marks: Marks,
        *,
        pace: Pace,
        report: Callable[[Progress], None],
        wishes: Wishes,
    ) -> None:
        """Begin after what W&B has."""
        self._reader, self._run, self._marks = reader, run, marks
        self._pace, self._report_line, self._wishes = pace, report, wishes
        self._first_row = self._num_rows = run.next_row
        marks.confirm_alerts_before(run.next_row)
        self._last_row_position = reader.position_of_row(run.next_row - 1)
        self._position = -1
        self._finish: tuple[int, int] | None = None
        self._alerts_sent = self._alerts_suppressed = self._refused = 0
        self._alert_times: dict[str, float] = {}
        self._confirmed_rows, self._confirmed_position = run.next_row, self._last_row_position
        self._undone = undone_tables(reader, marks, run.next_row) if run.is_online else ()
        self._reported_at, self._reported_position = 0.0, -1
        self._handled_stop = False

    def follow(self) -> SinkState:
        """Send until there is nothing left to do; return how the child ends. Raises what the run's calls raise."""
        held = self._reader.num_rows()
        if self._first_row > held:
            raise ForeignRowsError(
                f"W&B's run has {self._first_row} rows, this outbox {held}: they are not the same run"
            )
        self._report(SinkState.RUNNING)
        self._tell_of_lost_rows()
        while True:
            newest = self._reader.newest_position()
            entries = self._reader.after(self._position, _BATCH_ENTRIES, from_row=self._first_row)
            for entry in entries:
                self._take(entry)
                if (end := self._end_within()) is not None:
                    return self._suspended(end)
            if not entries:
                self._position = max(self._position, newest)  # what was left out is in W&B already
                if (end := self._end_when_idle()) is not None:
                    return end
                self._wishes.stop.wait(_POLL_SECONDS)

    def _end_within(self) -> SinkState | None:
        if self._wishes.orphaned.is_set():
            return SinkState.SUSPENDED
        if self._wishes.stop_run.is_set() and not self._handled_stop and self._must_look_again():
            return SinkState.STOP_REQUESTED
        return None

    def _end_when_idle(self) -> SinkState | None:
        self._settle_alerts()
        if self._finish is not None and self._reader.newest_position_of("row") < self._finish[1]:
            return self._finished(self._finish[0])  # a table that was sent once more leaves the run ended
        end = self._end_within()
        if end is None and self._wishes.stop.is_set():
            end = SinkState.SUSPENDED
        if end is not None:
            return self._suspended(end)
        moved = self._reported_position != self._position
        self._report_if_due(0.0 if moved else _BEAT_SECONDS)
        return None

    # ------------------------------------------------------------------------------------------------------- entries

    def _take(self, entry: StoredEntry) -> None:
        value = _readable(entry)
        if entry.row_number is not None:
            self._take_row(entry, value)
        elif entry.kind == "alert":
            self._take_alert(str(value.get("id") or entry.position), value)
        elif entry.kind == "notice":
            self._take_notice(entry.position, value)
        elif entry.kind == "finish":
            self._finish = int(value.get("exit_code", 0)), entry.position
        self._position = entry.position
        self._report_if_due(_REPORT_SECONDS)

    def _take_row(self, entry: StoredEntry, value: Mapping[str, Any]) -> None:
        if entry.row_number != self._num_rows:
            raise ForeignRowsError(f"row {entry.row_number} follows row {self._num_rows - 1} of the outbox")
        while (seconds := self._pace.wait_seconds(time.monotonic())) > 0.0:
            self._report_if_due(_REPORT_SECONDS)
            time.sleep(min(seconds, _REPORT_SECONDS))
        try:
            if not value:  # W&B takes no step for a row without values
                raise RefusedValueError("the payload is empty or cannot be read")
            if entry.kind == "row":
                self._run.log_row(value)
            elif entry.kind == "table":
                if self._run.is_online:
                    self._marks.begin_table(self._num_rows)
                self._run.log_table(value, self._num_rows)
            else:
                raise RefusedValueError(f"rows of kind {entry.kind} are of a newer version")
        except RefusedValueError as error:
            # The row's number is spent whatever it holds, so that all later ones stay W&B's.
            _LOG.exception("row %d cannot be told to W&B", entry.row_number)
            self._refused += 1
            self._marks.confirm_tables([self._num_rows])
            stamp = value.get("_timestamp")
            self._run.log_row({
                "sidecar/refused_row": str(error)[:_MAX_REASON_CHARACTERS],
                **({"_timestamp": stamp} if isinstance(stamp, float | int) else {}),
            })  # fmt: skip
        self._num_rows += 1

    def _take_alert(self, incident_id: str, value: Mapping[str, Any]) -> None:
        if incident_id in self._marks.alerts_sent and incident_id not in self._alert_times:
            return  # an earlier child's
        now = time.monotonic()
        flood = sum(now - at < _FLOOD_SECONDS for at in self._alert_times.values()) >= _MAX_FLOOD_ALERTS
        if flood or incident_id in self._alert_times or not self._marks.begin_alert(incident_id, self._num_rows):
            self._alerts_suppressed += 1
            return
        self._alert_times[incident_id] = now
        text = f"{value.get('text', '')}\n{alert_tag(incident_id)}"
        self._run.alert(str(value.get("title", "sidestep")), text, str(value.get("level", "warning")))
        self._alerts_sent += 1

    def _take_notice(self, position: int, value: Mapping[str, Any]) -> None:
        if position > self._last_row_position:  # W&B has what was handed over before a row that it has
            self._run.log_line(str(value.get("text", "")))

    def _settle_alerts(self) -> None:
        now = time.monotonic()
        self._marks.confirm_alerts([i for i, at in self._alert_times.items() if now - at > _ALERT_SETTLE_SECONDS])

    # ----------------------------------------------------------------------------------------------------------- ends

    def _must_look_again(self) -> bool:
        """Whether only a new child can tell the page's stop from a refused upload: both are asked for alike."""
        asked_at_rows = self._marks.stop_check_rows
        self._marks.stop_check_rows = self._num_rows if asked_at_rows < 0 else -1
        self._marks.save()
        if asked_at_rows < 0:
            return True
        self._handled_stop = True  # the server has every row of the child before, so nothing was refused
        self._report(SinkState.STOPPED_BY_PAGE)
        return False

    def _tell_of_lost_rows(self) -> None:
        if self._first_row < self._marks.stop_check_rows:
            self._marks.stop_check_rows = -1
            self._marks.save()
            self._report(SinkState.UPLOAD_REFUSED)

    def _finished(self, exit_code: int) -> SinkState:
        self._report(SinkState.FINISHING)
        self._run.finish(exit_code)
        self._verify(is_over=True)
        self._marks.end_attempts = 0
        self._marks.finished_position = self._position
        self._marks.save()
        return SinkState.FINISHED

    def _suspended(self, state: SinkState) -> SinkState:
        self._report(SinkState.FINISHING)
        self._run.suspend()
        if state is not SinkState.STOP_REQUESTED:
            self._verify(is_over=False)
        return state

    def _verify(self, *, is_over: bool) -> None:
        """Look whether the server has what ``finish`` says is uploaded: after a refused upload it says so all the same.

        Raises:
            UndeliveredError: it has not.
        """
        found = self._run.ask_server()
        if found is not None and found.num_rows < self._num_rows:
            raise UndeliveredError(
                f"{self._num_rows - found.num_rows} of {self._num_rows} rows are missing at W&B's server after the end"
            )
        if found is not None and is_over and found.state == "running":
            self._marks.end_attempts += 1
            self._marks.save()
            if self._marks.end_attempts < _MAX_END_ATTEMPTS:
                raise UndeliveredError("W&B's server does not answer that the run has ended")
            _LOG.warning("W&B's server has all rows and still shows the run as going on; it is taken as ended")
        self._marks.confirm_alerts(self._alert_times)
        self._marks.confirm_tables(self._run.take_uploaded_tables())
        self._confirmed_rows, self._confirmed_position = self._num_rows, self._position

    # -------------------------------------------------------------------------------------------------------- reports

    def progress(self, state: SinkState, detail: str = "") -> Progress:
        """Return a report of how far this child is."""
        undone, self._undone = self._undone, ()
        return Progress(
            state=state,
            position=self._position,
            num_rows=self._num_rows,
            alerts_sent=self._alerts_sent,
            alerts_suppressed=self._alerts_suppressed,
            entries_refused=self._refused,
            confirmed_position=self._confirmed_position,
            tables_undone=undone,
            complaint=self._run.complaint,
            detail=detail,
        )

    def _report_if_due(self, seconds: float) -> None:
        if time.monotonic() - self._reported_at >= seconds:
            self._run.wait_for_core()  # a stopped core takes hundreds of rows into its socket's buffer: no progress
            self._report(SinkState.RUNNING)

    def _confirm(self) -> None:
        self._marks.confirm_tables(self._run.take_uploaded_tables())
        heard = self._run.heard_rows
        if heard is not None and self._confirmed_rows < heard <= self._num_rows:
            self._confirmed_rows = heard
            self._confirmed_position = self._reader.position_of_row(heard - 1)

    def _report(self, state: SinkState) -> None:
        self._confirm()
        self._reported_at, self._reported_position = time.monotonic(), self._position
        self._report_line(self.progress(state))


def _readable(entry: StoredEntry) -> dict[str, Any]:
    """Return the payload, or an empty map where it is none."""
    try:
        value: Any = entry.value()
    except ValueError:
        _LOG.exception("entry %d of the outbox is not JSON", entry.position)
        return {}
    return value if isinstance(value, dict) else {}


def alert_tag(incident_id: str) -> str:
    """Return how an incident's id stands in its alert's text, by which a repeat is told from a new one."""
    return f"[incident {incident_id}]"
