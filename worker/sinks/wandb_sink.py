"""The W&B sink: a process of its own that follows one run's outbox into W&B.

    python -m sidestep.worker.sinks.wandb_sink --journal DIR --run RUN_ID --out DIR --mode offline|online|disabled

It is a process because nothing less can be guarded: with wandb-core stopped, ``run.log``, ``teardown`` and the
interpreter's own exit wait without limit (docs/delivery.md, section 4). wandb_supervisor.py starts, watches and kills
it; it ends by ``os._exit`` for the same reason. Any call into W&B that raises ends the process too: the next one begins
at the row where W&B really stands, so nothing is sent twice and nothing is left out.

This is the one module that imports wandb, and it does so only when there is something to send.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from PIL import Image

from sidestep.worker.outbox import StoredEntry
from sidestep.worker.sinks import wandb_axes
from sidestep.worker.sinks.outbox_reader import OutboxReader
from sidestep.worker.sinks.wandb_follow import Follower, ForeignRowsError, Pace, RefusedValueError, Wishes, alert_tag
from sidestep.worker.sinks.wandb_marks import Marks
from sidestep.worker.sinks.wandb_opening import run_settings, shown_config
from sidestep.worker.sinks.wandb_position import cut_torn_logs, fragment_folders, offline_position, set_aside_empty
from sidestep.worker.sinks.wandb_processes import MARK_VARIABLE, SinkLock, end_marked, mark_of
from sidestep.worker.sinks.wandb_progress import EXIT_AGAIN, EXIT_NEVER, Progress, SinkState
from sidestep.worker.sinks.wandb_scratch import Scratch
from sidestep.worker.sinks.wandb_server import Answer, ServerRun, ServerWatch
from sidestep.worker.sinks.wandb_tables import owed_tables
from sidestep.worker.sinks.wandb_uploads import TableUploads

_LOG: Final = logging.getLogger(__name__)

_LEFTOVER_TIMEOUT_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.1
_ASK_TIMEOUT_SECONDS: Final = 5
_MAX_ALERT_TITLE_CHARACTERS: Final = 63
_ALERT_LEVELS: Final = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}
_RESERVED_KEYS: Final = (wandb_axes.AXES_KEY, "_runtime", "_step", "_wandb")
"""A trainer's scalar of such a name would move W&B's own counter."""
_SUSPENDED_EXIT_CODE: Final = 1  # with mark_preempting W&B shows the run as preempted, not as failed


class WandbRun:
    """A W&B run that is open (``TrackedRun``). Any call may block without limit: that is the supervisor's business."""

    def __init__(
        self,
        opening: Mapping[str, Any],
        *,
        out: Path,
        run_id: str,
        mode: str,
        init_seconds: float,
        finish_seconds: float,
        scratch: Scratch,
        on_stop: Callable[[], None],
    ) -> None:
        """Open the run, or resume it where it stands; raises what ``wandb.init`` raises.

        ``on_stop`` is a plain function: wandb copies its settings deeply, and a method would bring its object along.
        """
        import wandb  # noqa: PLC0415 (1.4 s and 70 MB, only where there is something to send)

        self._wandb, self._scratch = wandb, scratch
        self._axes = wandb_axes.Axes()
        self._offline_rows = 0
        self.is_online = mode == "online"
        self._uploads = TableUploads()
        self._run = wandb.init(
            project=opening.get("project") or None,
            entity=opening.get("entity") or None,
            name=opening.get("name") or None,
            tags=list(opening.get("tags") or ()),
            config=shown_config(opening),
            id=run_id,
            dir=str(out),
            mode="offline" if mode == "offline" else "online",
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                **run_settings(opening, init_seconds=init_seconds, finish_seconds=finish_seconds), stop_fn=on_stop
            ),
        )

        self._handed_rows = self.next_row
        self._server = ServerWatch(self._asked, self._answers, lambda: self._handed_rows)
        if self.is_online:
            self._server.start()

    def resume_after(self, num_rows: int) -> None:
        """Say how many rows the earlier fragments hold, which an offline run cannot know."""
        self._offline_rows = num_rows

    @property
    def next_row(self) -> int:
        """The run's next ``_step``, the fragments before included."""
        return self._offline_rows + int(self._run.starting_step)

    def log_row(self, row: Mapping[str, Any]) -> None:
        """Log a row; histograms are made of their counts and edges. Raises RefusedValueError."""
        with _refusing():
            self._log({key: self._value(value) for key, value in row.items()})

    def log_table(self, table: Mapping[str, Any], row_number: int) -> None:
        """Log a table, whole and never to be changed, beside the row's own scalars. Raises RefusedValueError."""
        with _refusing():
            self._log_table(table, row_number)
        self._scratch.clear()

    def take_uploaded_tables(self) -> set[int]:
        """Return, once, the rows whose tables W&B has committed."""
        return self._uploads.take()

    def _log_table(self, table: Mapping[str, Any], row_number: int) -> None:
        columns: list[str | int] = [str(column) for column in table["columns"]]
        key = str(table["key"])
        cells = [[self._cell(cell) for cell in row] for row in table["rows"]]
        if any(len(row) != len(columns) for row in cells):
            raise ValueError(f"a row of table {key} has other columns than {columns}")
        scalars = {k: v for k, v in table.items() if k not in {"columns", "key", "rows"}}
        drawn = self._wandb.Table(columns=columns, data=cells, log_mode="IMMUTABLE", allow_mixed_types=True)
        self._log({**scalars, key: drawn})
        handle = getattr(getattr(getattr(drawn, "_artifact_target", None), "artifact", None), "_save_handle", None)
        if handle is not None:
            self._uploads.watch(row_number, handle)
        else:  # offline, or a version of wandb that keeps it elsewhere
            self._uploads.done(row_number)

    def _log(self, values: dict[str, Any]) -> None:
        for name, axis in self._axes.unnamed(values):
            if axis is None:
                self._run.define_metric(name)
            else:
                self._run.define_metric(name, step_metric=axis, step_sync=False)
        for reserved in _RESERVED_KEYS:
            values.pop(reserved, None)
        self._run.log(values)
        self._handed_rows += 1

    def alert(self, title: str, text: str, level: str) -> None:
        """Send an alert; W&B's own wait between alerts of one title is set as short as it goes."""
        title = title[:_MAX_ALERT_TITLE_CHARACTERS]
        self._run.alert(title, text, level=_ALERT_LEVELS.get(level, "WARN"), wait_duration=0.001)

    def log_line(self, text: str) -> None:
        """Add a line to the run's page of logs."""
        self._run.write_logs(text)

    def wait_for_core(self) -> None:
        """Ask wandb-core for something that it answers after all that was logged before; TimeoutError after 30 s."""
        _ = self._run.step

    def finish(self, exit_code: int) -> None:
        """Finish the run, 0 as finished and otherwise as failed; TimeoutError where not all could be uploaded."""
        self._run.finish(exit_code=exit_code)

    def suspend(self) -> None:
        """Upload what there is and let the run be resumed."""
        self._run.mark_preempting()
        self._run.finish(exit_code=_SUSPENDED_EXIT_CODE)

    @property
    def heard_rows(self) -> int | None:
        """Rows that the server had when it was last asked."""
        return self._server.rows

    @property
    def complaint(self) -> str:
        """What is wrong with the server at the moment."""
        return self._server.complaint

    def ask_server(self) -> ServerRun | None:
        """Ask the server for the run, None offline; raises ``wandb.CommError``, or ConnectionError without a core."""
        if not self.is_online:
            return None
        try:
            return self._asked()
        except self._wandb.errors.CommError:  # once more: the first question after a pause may meet a stale connection
            return self._asked()

    def _asked(self) -> ServerRun:
        run = self._run
        api = self._wandb.Api(timeout=_ASK_TIMEOUT_SECONDS, overrides={"entity": run.entity, "project": run.project})
        found = api.run(run.path)
        return ServerRun(num_rows=int(found.historyLineCount or 0), state=str(found.state))

    def _answers(self) -> list[Answer]:
        """Return what wandb-core noted of failing requests since the last call."""
        interface = self._run._interface  # noqa: SLF001 (it tells nobody else)
        if interface is None:
            return []
        result = interface.deliver_network_status().wait_or(timeout=_ASK_TIMEOUT_SECONDS)
        said = result.response.network_status_response.network_responses
        return [Answer(status=each.http_status_code, text=each.http_response_text) for each in said]

    def _value(self, value: Any) -> Any:
        if isinstance(value, dict) and value.get("_type") == "histogram":
            counts, edges = value["counts"], value["edges"]
            if len(edges) != len(counts) + 1:
                raise ValueError(f"a histogram of {len(counts)} counts has {len(edges)} edges")
            return self._wandb.Histogram(np_histogram=(counts, edges))
        return value

    def _cell(self, cell: Any) -> Any:
        if isinstance(cell, dict) and cell.get("_type") == "image":
            try:
                picture = Image.open(io.BytesIO(base64.b64decode(cell["png"], validate=True)))
                picture.load()
            except OSError as error:
                raise ValueError(f"a picture cannot be read: {error}") from error
            return self._wandb.Image(picture)
        return cell


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Tell values that W&B can never take, which it says before anything is sent, from calls that failed."""
    try:
        yield
    except json.JSONDecodeError:  # a server's answer
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedValueError(f"{type(error).__name__}: {error}") from error


class WandbSink:
    """One life of the child process."""

    def __init__(self, options: argparse.Namespace, report: Callable[[Progress], None], wishes: Wishes) -> None:
        """Take the command line's options."""
        self._run_id: str = options.run
        self._out: Path = options.out
        self._mode: str = options.mode
        self._init_seconds: float = options.init_seconds
        self._finish_seconds: float = options.finish_seconds
        self._pace = Pace(rows_per_second=options.rows_per_second if options.mode == "online" else 0.0)
        self._report, self._wishes = report, wishes
        self._reader = OutboxReader(options.journal, options.run)

    def live(self) -> int:
        """Follow the outbox to the end; return the exit code. Raises what W&B raises."""
        self._out.mkdir(parents=True, exist_ok=True)
        lock = SinkLock(self._out / f"wandb-sink-{self._run_id}.lock")
        if not self._wait_until(lock.try_take):
            return self._ended(SinkState.SUSPENDED)
        if left := end_marked(mark_of(self._out, self._run_id), _LEFTOVER_TIMEOUT_SECONDS):
            raise TimeoutError(f"processes {sorted(left)} of an earlier sink of this run cannot be ended")
        marks = Marks.load(self._out / f"wandb-sink-{self._run_id}.json")
        opening: list[StoredEntry] = []

        def something_to_send() -> bool:
            opening[:] = self._reader.after(-1, 1)
            return bool(opening)

        if self._is_finished(marks):
            return self._ended(SinkState.FINISHED, marks.finished_position)
        if not self._wait_until(something_to_send):
            return self._ended(SinkState.SUSPENDED)
        scratch = Scratch(self._out / f"wandb-sink-{self._run_id}.tmp")
        run = self._opened(opening[0], marks, scratch)
        follower = Follower(self._reader, run, marks, pace=self._pace, report=self._report, wishes=self._wishes)
        end = follower.follow()
        scratch.remove()
        self._report(follower.progress(end))
        return EXIT_AGAIN if end is SinkState.STOP_REQUESTED else 0

    def _is_finished(self, marks: Marks) -> bool:
        """Whether W&B has everything; a worker may have died before it heard that a table is to be sent once more."""
        if not 0 <= self._reader.newest_position() <= marks.finished_position:
            return False
        return self._mode == "offline" or not owed_tables(self._reader, marks, self._reader.num_rows())

    def _opened(self, first: StoredEntry, marks: Marks, scratch: Scratch) -> WandbRun:
        opening = first.value() if first.kind == "run" else {}
        held = num_fragments = 0
        if self._mode == "offline":
            held = self._offline_rows(marks)
            num_fragments = self._wait_for_a_new_second()
        run = WandbRun(
            opening,
            out=self._out,
            run_id=self._run_id,
            mode=self._mode,
            init_seconds=self._init_seconds,
            finish_seconds=self._finish_seconds,
            scratch=scratch,
            on_stop=lambda: self._wishes.stop_run.set(),  # noqa: PLW0108 (a method cannot be copied)
        )
        run.resume_after(held)
        if self._mode == "offline" and len(fragment_folders(self._out, self._run_id)) != num_fragments + 1:
            # The SDK goes to a temporary folder where it cannot write; rows there would be sent again and again.
            raise OSError(f"W&B does not write under {self._out}")
        return run

    def _offline_rows(self, marks: Marks) -> int:
        for place in set_aside_empty(self._out, self._run_id):
            _LOG.info("%s: a fragment that never began", place)
        for log in cut_torn_logs(self._out, self._run_id):
            _LOG.info("%s: cut behind its last whole record", log)
        position = offline_position(self._out, self._run_id, marks.fragment_rows)
        written = "\n".join(position.alert_texts)
        marks.confirm_alerts([incident_id for incident_id in marks.alert_attempts if alert_tag(incident_id) in written])
        marks.fragment_rows = dict(position.fragments)
        marks.save()
        return position.next_row

    def _wait_for_a_new_second(self) -> int:
        """Wait until a fragment's folder, named by the second, cannot be one that exists; return how many there are."""
        folders = fragment_folders(self._out, self._run_id)
        while folders and folders[-1].name[len("offline-run-") :][:15] >= time.strftime("%Y%m%d_%H%M%S"):
            time.sleep(_POLL_SECONDS)
        return len(folders)

    def _wait_until(self, ready: Callable[[], bool]) -> bool:
        while not ready():
            if self._wishes.stop.is_set() or self._wishes.orphaned.is_set():
                return False
            self._wishes.stop.wait(_POLL_SECONDS)
        return True

    def _ended(self, state: SinkState, position: int = -1) -> int:
        num_rows = self._reader.num_rows()
        self._report(Progress(state=state, position=position, num_rows=num_rows, confirmed_position=position))
        return 0


def _private_output() -> Callable[[Progress], None]:
    """Keep standard output for reports: whatever W&B prints goes to standard error."""
    sys.stdout.flush()
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def report(progress: Progress) -> None:
        with lock:
            try:
                os.write(channel, progress.line())
            except BrokenPipeError:
                _LOG.warning("nobody hears the report %s", progress.state)

    return report


def _listen(wishes: Wishes, *, owner_on_stdin: bool) -> None:
    # ``Event.set`` takes a lock that the main thread, which signals interrupt, may hold just then: it would wait for
    # itself, and each further signal on top of that. ``SimpleQueue.put`` may interrupt anything.
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()

    def on_signal(number: int, _frame: object) -> None:
        signals.put(number)

    def heed_signals() -> None:
        signals.get()
        wishes.stop.set()

    def watch_owner() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        wishes.orphaned.set()
        wishes.stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=heed_signals, name="signals", daemon=True).start()
    if owner_on_stdin:
        threading.Thread(target=watch_owner, name="owner", daemon=True).start()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sidestep.worker.sinks.wandb_sink", description="Follow an outbox into W&B."
    )
    parser.add_argument("--journal", type=Path, required=True, help="folder of the journal")
    parser.add_argument("--run", required=True, help="the run's id")
    parser.add_argument("--out", type=Path, required=True, help="folder under which W&B keeps its own files")
    parser.add_argument("--mode", choices=("offline", "online", "disabled"), default="offline")
    parser.add_argument("--rows-per-second", type=float, default=10.0, help="online only; 0: no limit")
    parser.add_argument("--init-seconds", type=float, default=20.0, help="how long the server may take to open the run")
    parser.add_argument("--finish-seconds", type=float, default=30.0, help="how long the last uploads may take")
    parser.add_argument("--owner-on-stdin", action="store_true", help="end when standard input ends")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the child process; return its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    report = _private_output()
    if options.mode == "disabled":
        report(Progress(state=SinkState.DISABLED))
        return 0
    os.environ[MARK_VARIABLE] = mark_of(options.out, options.run)  # wandb-core inherits it
    # A trainer with a run of its own names its wandb-core here; shared, it would hold our run beyond our death ("run ID
    # is in use").
    os.environ.pop("WANDB_SERVICE", None)
    # Offline tables are known by the absolute paths of their staged files, which ``wandb sync`` reads: they stay beside
    # the run's own. (Of each table the SDK stages a second copy of the JSON that nothing names; the pictures are all
    # needed.)
    os.environ.setdefault("WANDB_DATA_DIR", str(options.out.resolve() / "wandb-data"))
    wishes = Wishes(stop=threading.Event(), orphaned=threading.Event(), stop_run=threading.Event())
    _listen(wishes, owner_on_stdin=options.owner_on_stdin)
    report(Progress(state=SinkState.STARTING))
    try:
        return WandbSink(options, report, wishes).live()
    except ForeignRowsError as error:
        report(Progress(state=SinkState.FAILED, detail=str(error)))
        return EXIT_NEVER
    except Exception as error:  # noqa: BLE001 (reported, and the next child begins where W&B stands)
        _LOG.exception("a call into W&B failed")
        report(Progress(state=SinkState.FAILED, detail=f"{type(error).__name__}: {error}"[:500]))
        return EXIT_AGAIN


def _exit(code: int) -> NoReturn:
    """Leave at once: atexit would wait for a wandb-core that may be dead or stopped."""
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    _exit(main())
