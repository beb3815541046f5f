"""The sinks of a worker's runs: its own console, and for each run the child process that feeds W&B.

None of them is waited for while a training goes on; what they lack stays in the outbox.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

from sidestep.protocol.messages import Notice
from sidestep.worker.config import WorkerConfig
from sidestep.worker.errors import ConfigError
from sidestep.worker.outbox import StoredEntry
from sidestep.worker.sinks.console_sink import ConsoleSink
from sidestep.worker.sinks.wandb_supervisor import WandbSinkConfig, WandbStatus, WandbSupervisor
from sidestep.worker.sinks.wandb_trouble import told, trouble_of

_LOG: Final = logging.getLogger(__name__)
_POLL_SECONDS: Final = 0.05
_LEAST_STOP_SECONDS: Final = 1.0
_SAY_AGAIN_SECONDS: Final = 60.0

Mode = Literal["offline", "online", "disabled"]
_TUNED: Final[Mapping[str, str]] = {
    "SIDESTEP_WANDB_ROWS_PER_SECOND": "rows_per_second",
    "SIDESTEP_WANDB_STALL_SECONDS": "stall_seconds",
    "SIDESTEP_WANDB_START_SECONDS": "start_seconds",
    "SIDESTEP_WANDB_INIT_SECONDS": "init_seconds",
    "SIDESTEP_WANDB_FINISH_SECONDS": "finish_seconds",
}
"""Variables that change one field of ``WandbSinkConfig`` for all of a worker's runs."""
_MODES: Final[Mapping[str, Mode]] = {
    "online": "online", "run": "online", "shared": "online",
    "offline": "offline", "dryrun": "offline", "disabled": "disabled",
}  # fmt: skip


def wandb_mode(chosen: str, environment: Mapping[str, str] | None = None) -> Mode:
    """Return how W&B is used: as chosen, else as ``WANDB_MODE`` says, else online where a key is there, else offline.

    Raises:
        ConfigError: ``WANDB_MODE`` is no mode.
    """
    environment = os.environ if environment is None else environment
    wanted = chosen or environment.get("WANDB_MODE", "")
    if wanted:
        if wanted not in _MODES:
            raise ConfigError(f"wandb_mode: {wanted!r} (from WANDB_MODE) is not online, offline or disabled")
        return _MODES[wanted]
    return "online" if environment.get("WANDB_API_KEY") or _has_netrc_entry(environment) else "offline"


def wandb_patience(environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Return the fields of ``WandbSinkConfig`` that the environment sets (``SIDESTEP_WANDB_STALL_SECONDS`` and others).

    Raises:
        ConfigError: a value is no number of 0 or more, or 0 where it has to be positive.
    """
    environment = os.environ if environment is None else environment
    chosen = {}
    for variable, name in _TUNED.items():
        if text := environment.get(variable):
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if not math.isfinite(number) or number < 0 or (number == 0 and name != "rows_per_second"):
                raise ConfigError(f"{variable}: {text!r} is not a number above 0 (rows per second: 0 for no limit)")
            chosen[name] = number
    return chosen


def _has_netrc_entry(environment: Mapping[str, str]) -> bool:
    host = environment.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    path = Path(environment.get("NETRC") or Path.home() / ".netrc")
    try:
        words = path.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False  # there is none, or it is not ours to read
    return any(words[at : at + 2] == ["machine", host] for at in range(len(words)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PageNews:
    """What came back from W&B."""

    stopped: tuple[str, ...] = ()
    """Runs that somebody stopped on their page."""
    unconfirmed_tables: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Run to the row numbers of tables that a killed child may not have uploaded."""
    notices: tuple[tuple[str, Notice], ...] = ()
    """Run and line for its trainer's console: W&B does not take rows, or takes them again."""


class Deliveries:
    """Brings entries to the console as they are written, and keeps one W&B child per run at work."""

    def __init__(self, config: WorkerConfig, *, journal: Path, out: Path, console: ConsoleSink, mode: Mode) -> None:
        """Start nothing yet."""
        self._config = config
        self._journal = journal
        self._out = out
        self._console = console
        self._mode = mode
        self._patience = wandb_patience()
        self._supervisors: dict[str, WandbSupervisor] = {}
        self._broken: set[str] = set()
        self._troubles: dict[str, str] = {}
        self._said_at: dict[tuple[str, str], float] = {}

    def open(self, run_id: str) -> None:
        """Begin to feed W&B with a run. Idempotent."""
        if run_id in self._supervisors:
            return
        defaults = {"WANDB_PROJECT": self._config.project, "WANDB_ENTITY": self._config.entity}
        made = WandbSupervisor(
            WandbSinkConfig(
                journal=self._journal,
                run_id=run_id,
                out=self._out,
                mode=self._mode,
                environment={name: value for name, value in defaults.items() if value},
                **self._patience,
            )
        )
        self._supervisors[run_id] = made
        made.start()

    def show(self, entries: Iterable[StoredEntry]) -> None:
        """Give entries that have just been written to the console."""
        self._console.take(list(entries))

    def poll(self) -> PageNews:
        """Watch the children; return what they say that the worker has to act upon."""
        stopped: list[str] = []
        unconfirmed: dict[str, tuple[int, ...]] = {}
        notices: list[tuple[str, Notice]] = []
        for run_id, supervisor in self._supervisors.items():
            try:
                supervisor.poll()
            except sqlite3.Error as error:
                if run_id not in self._broken:
                    _LOG.error("the outbox of run %s cannot be read: %s", run_id, error)
                self._broken.add(run_id)
                continue
            if supervisor.take_stop_request():
                stopped.append(run_id)
            if tables := supervisor.take_unconfirmed_tables():
                unconfirmed[run_id] = tables
            notices += [(run_id, notice) for notice in self._changes(run_id, supervisor.status())]
        return PageNews(stopped=tuple(stopped), unconfirmed_tables=unconfirmed, notices=tuple(notices))

    def _changes(self, run_id: str, status: WandbStatus) -> list[Notice]:
        """Return what is to be said of a trouble that has come or gone; one kind at most once a minute."""
        before, now = self._troubles.get(run_id, ""), time.monotonic()
        if not status.complaint:
            if not self._troubles.pop(run_id, ""):
                return []
            text = f"W&B takes run {run_id} again; {status.entries_behind} entries wait to be sent"
            _LOG.info("%s", text)
            return [Notice(text=text, level="info")]
        trouble = trouble_of(status.complaint, is_given_up=status.is_given_up)
        self._troubles[run_id] = trouble.code
        if before == trouble.code or now - self._said_at.get((run_id, trouble.code), -math.inf) < _SAY_AGAIN_SECONDS:
            return []
        self._said_at[run_id, trouble.code] = now
        text = told(run_id, status.complaint, trouble)
        _LOG.warning("%s", text)
        return [Notice(text=f"sidestep: {text}", level="warning")]

    def waiting(self, run_ids: Iterable[str]) -> dict[str, int]:
        """Return, of these runs, those that W&B is not known to have all of, and what it may lack.

        One whose sink met what no new sink can mend is not waited for.
        """
        found = {}
        for run_id in run_ids:
            supervisor = self._supervisors.get(run_id)
            if supervisor is not None and self._mode != "disabled":
                status = supervisor.status()
                if not status.is_given_up and (status.entries_unconfirmed or status.pid is not None):
                    found[run_id] = status.entries_unconfirmed
        return found

    def close(self, ended: Iterable[str], timeout_seconds: float) -> dict[str, int]:
        """Let the children send what waits, then end them; return run to entries that W&B may still lack.

        What was handed over and is not known to have arrived counts among them: a journal keeps it all, and the next
        child begins where W&B stands.
        """
        deadline = time.monotonic() + timeout_seconds
        ended = list(ended)
        asked = Counter[str]()
        while True:
            # The journal is closed for more by now: the next worker's sinks ask for these tables again.
            asked.update({run_id: len(tables) for run_id, tables in self.poll().unconfirmed_tables.items()})
            if not self.waiting(ended) or time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        for supervisor in self._supervisors.values():
            supervisor.request_stop()
        behind = {}
        for run_id, supervisor in self._supervisors.items():
            supervisor.stop(max(_LEAST_STOP_SECONDS, deadline - time.monotonic()))
            undone = supervisor.status().entries_unconfirmed + asked[run_id]
            if self._mode != "disabled" and undone:
                behind[run_id] = undone
        self._console.close()
        return behind

    def statistics(self) -> dict[str, Any]:
        """Return how the sinks stand, for /healthz."""
        runs = {run_id: asdict(supervisor.status()) for run_id, supervisor in list(self._supervisors.items())}
        for status in runs.values():
            status["state"] = str(getattr(status["state"], "value", status["state"]))
        return {"console": dict(self._console.statistics()), "wandb": cast("dict[str, Any]", runs)}
