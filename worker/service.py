"""The worker: listens, journals, assembles, projects, delivers; ends in order (docs/delivery.md, section 10)."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from sidestep.protocol.endpoints import Endpoint, default_endpoint
from sidestep.protocol.keys import server_keys
from sidestep.protocol.messages import Command, Notice
from sidestep.worker.advice import warnings
from sidestep.worker.config import WorkerConfig
from sidestep.worker.delivery import Deliveries, wandb_mode
from sidestep.worker.detectors.plugins import load_detectors
from sidestep.worker.errors import ConfigError, JournalError
from sidestep.worker.health import HealthServer, write_end, write_worker_file
from sidestep.worker.heard import HeardRuns
from sidestep.worker.home import home_folder, new_run_folder, remember_latest
from sidestep.worker.intake.assembly import Journaled
from sidestep.worker.intake.feed import Feed, Refused
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.listening import EndpointLock
from sidestep.worker.intake.receiver import Receiver
from sidestep.worker.intake.reception import Reception
from sidestep.worker.intake.reserve import RESERVE_BYTES
from sidestep.worker.own_detectors import remember
from sidestep.worker.pipeline import RunPipeline
from sidestep.worker.requests import Requests
from sidestep.worker.settled import KnownRun, SettledRun, open_runs
from sidestep.worker.sinks.console_sink import ConsoleSink
from sidestep.worker.trainers import Trainers, is_alive
from sidestep.worker.watch_making import installed

_LOG: Final = logging.getLogger(__name__)
_TICK_SECONDS: Final = 0.05
_SINK_POLL_SECONDS: Final = 0.2
_TIDY_SECONDS: Final = 1.0
_STUCK_SECONDS: Final = 10.0
_TAKES_PER_TURN: Final = 8
_LAST_TURNS_SECONDS: Final = 8.0
"""Of an end's 45 s (compose's grace): 2 for what is on its way, 8 to assemble, 30 for the sinks, a rest to close."""
_RUNS_DELIVERED_AGAIN: Final = 8
"""Of the runs that had ended when a worker starts, so many are looked at for entries that W&B lacks."""


class WorkerService:
    """One worker process. ``run`` returns when it has been asked to end, or has nothing left to stay for."""

    def __init__(self, config: WorkerConfig, *, console: TextIO) -> None:
        """Take the endpoint and the journal.

        Raises:
            ConfigError: an option cannot be used.
            EndpointError: the endpoint is malformed.
            EndpointBusyError: another worker serves it.
            ListenError: it must not be listened on.
            JournalError: the journal cannot be used.
            KeyFileError: a key file is missing, or others may read it.
        """
        self._config = config
        self._is_asked_to_stop = False  # a plain flag: a signal handler may take no lock
        self.instance = secrets.token_hex(8)
        self._started_at = time.time()
        mode = wandb_mode(config.wandb_mode)
        endpoint = Endpoint.parse(config.endpoint) if config.endpoint else default_endpoint()
        keys = server_keys(endpoint, config.keys)
        self._lock = EndpointLock(endpoint, has_keys=keys is not None, owner_pid=config.owner_pid)
        out, folder = _places(config)
        try:
            self.journal = Journal(
                folder,
                segment_bytes=config.segment_bytes,
                max_bytes=config.journal_max_bytes,
                reserve_bytes=RESERVE_BYTES,
                on_network_fs=config.journal_on_network_fs,
            )
        except JournalError:
            self._lock.release()
            raise
        self._judge_by(config.detector)
        self._deliveries = Deliveries(config, journal=folder, out=out, console=ConsoleSink(console), mode=mode)
        self._pipelines = open_runs(self.journal, self._pipeline)
        starts = [each.recovery_start() for each in self._pipelines.values()]
        self._recovered_arrival = self.journal.segments.next_arrival
        known = [start for start in starts if start is not None]
        self._feed = Feed(
            self.journal.segments,
            limit_bytes=config.feed_bytes,
            start_arrival=min(known, default=self._recovered_arrival),
        )
        self._reception = Reception(
            self.journal,
            self._feed,
            instance=self.instance,
            commit_interval_seconds=config.commit_interval_seconds,
            commit_messages=config.commit_messages,
        )
        self._receiver = Receiver(endpoint, self._reception, keys=keys)
        self._trainers = Trainers(self.journal.index, config.trainer_silence_seconds)
        self._heard = HeardRuns()
        self._requests = Requests(self._reception.send)
        self._health: HealthServer | None = None
        self._idle_since: float | None = None
        self._sinks_polled_at = 0.0
        self._last_turn = time.monotonic()
        self._unreadable = ""
        """Why the journal cannot be read at the moment; empty while it can."""
        self._unread = ""
        self._tidied_at = 0.0
        self._owners_seen_at = 0.0
        self._has_joined = False

    def _judge_by(self, named: str) -> None:
        """Load detectors from elsewhere once, to know that they can be, and record them for replays."""
        own = [name.strip() for name in named.split(",") if name.strip()]
        references = tuple(dict.fromkeys((*own, *installed())))
        try:
            load_detectors(references)
        except ValueError as error:
            self.journal.close()
            self._lock.release()
            raise ConfigError(str(error)) from error
        remember(self.journal.index, references)

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._receiver.address

    def _pipeline(self, run_id: str) -> RunPipeline:
        return RunPipeline(self.journal, run_id, deadline_seconds=self._config.assembly_deadline_seconds)

    # ------------------------------------------------------------------------------------------------ life

    def run(self, ready: Callable[[str], None] = lambda _address: None) -> int:
        """Serve until asked to end; return 0, or 1 where something was left undelivered or the receiver failed.

        Raises:
            ListenError: the address cannot be bound.
            WorkerError: the health port is taken.
        """
        try:
            self._receiver.start()
            self._health = HealthServer(self.report, self._config.health_port, self._config.health_host)
            write_worker_file(
                self.journal.folder,
                endpoint=self.address,
                health_url=self._health.url,
                instance=self.instance,
                started_at=self._started_at,
            )
            self._remember()
            ready(self.address)
            while not self._is_over():
                if not self._turn(time.monotonic()):
                    self._feed.wait(_TICK_SECONDS)
            return self._end()
        finally:
            if self._health is not None:
                self._health.close()
            self.journal.close()
            self._lock.release()

    def _remember(self) -> None:
        try:
            remember_latest(home_folder(), self.journal.folder)
        except ConfigError as error:
            _LOG.warning("this run is not remembered as the latest: %s", error)
        runs = list(self._pipelines)
        for run_id in runs:
            if run_id in runs[-_RUNS_DELIVERED_AGAIN:] or not self._pipelines[run_id].is_ended:
                self._deliveries.open(run_id)

    def request_stop(self, *_signal: object) -> None:
        """Ask it to end; safe in a signal handler."""
        self._is_asked_to_stop = True

    def take_signals(self) -> None:
        """End in order on SIGTERM and SIGINT. Only the main thread may call it."""
        signal.signal(signal.SIGTERM, self.request_stop)
        signal.signal(signal.SIGINT, self.request_stop)

    def _is_over(self) -> bool:
        if self._is_asked_to_stop or not self._receiver.is_alive:
            return True
        wants_end = self._config.until_idle or self._config.owner_pid > 0
        if not wants_end or not self._is_idle():
            self._idle_since = None
            return False
        now = time.monotonic()
        self._idle_since = now if self._idle_since is None else self._idle_since
        if now - self._idle_since < self._config.idle_exit_seconds:
            return False
        if not self._lock.close_to_owners():
            self._idle_since = None  # somebody has joined at the last moment
            return False
        return True

    def _is_idle(self) -> bool:
        if self._config.owner_pid and self._has_owner():
            return False
        if self._config.until_idle and not self._pipelines:
            return False
        ended = all(pipeline.is_ended for pipeline in self._pipelines.values())
        return ended and not self._deliveries.waiting(self._pipelines)

    def _has_owner(self) -> bool:
        """Whether a process that this worker stays for lives; those that joined are looked at once a second."""
        if is_alive(self._config.owner_pid):
            return True
        now = time.monotonic()
        if now - self._owners_seen_at >= _TIDY_SECONDS:
            self._owners_seen_at, self._has_joined = now, self._lock.has_owner()
        return self._has_joined

    def _end(self) -> int:
        self._lock.close_to_owners(at_once=True)
        failed = not self._receiver.is_alive and not self._is_asked_to_stop
        self._receiver.stop()
        until = time.monotonic() + _LAST_TURNS_SECONDS
        while self._turn(time.monotonic(), is_last=True):
            if time.monotonic() >= until:
                _LOG.warning(
                    "what has arrived is on disk, but not all of it in rows: the next worker goes on from there"
                )
                break
        ended = [run_id for run_id, pipeline in self._pipelines.items() if pipeline.is_ended]
        behind = self._deliveries.close(ended, self._config.sink_drain_seconds)
        for run_id, count in behind.items():
            _LOG.warning(
                "%d entries of run %s have not reached W&B; they are kept in %s, and `sidestep replay` or a worker on "
                "that journal sends them",
                count,
                run_id,
                self.journal.folder,
            )
        exit_code = 1 if failed or behind else 0
        try:
            write_end(self.journal.folder, exit_code=exit_code, behind=behind)
        except (OSError, ValueError) as error:
            _LOG.warning("this end is not recorded for `sidestep status`: %s", error)
        return exit_code

    # ------------------------------------------------------------------------------------------------ one turn

    def _turn(self, now: float, *, is_last: bool = False) -> bool:
        """Do what there is to do; return whether anything moved. A journal that cannot be read is tried again."""
        try:
            self._unread = ""
            return self._go_round(now, is_last=is_last)
        except JournalError as error:
            self._unread = str(error)
            return False
        finally:
            if self._unread and self._unread != self._unreadable:
                _LOG.error("%s", self._unread)
            self._unreadable = self._unread

    def _go_round(self, now: float, *, is_last: bool) -> bool:
        self._last_turn = now
        moved = self._take_in(now)
        if self._feed.next_arrival >= self._recovered_arrival:
            for pipeline in self._pipelines.values():
                outcome = pipeline.advance(now, self._lost(pipeline, now, at_once=is_last))
                moved = moved or outcome.closings > 0
                self._deliveries.show(outcome.entries)
                for notice in outcome.notices:
                    self._reception.send(pipeline.run_id, notice)
                for request in outcome.requests:
                    self._ask(pipeline, request)
        if now - self._sinks_polled_at >= _SINK_POLL_SECONDS:
            self._sinks_polled_at = now
            news = self._deliveries.poll()
            for run_id in news.stopped:
                reason = "the run was stopped on its W&B page"
                self._ask(
                    self._pipelines[run_id], Command(action="stop", command_id=f"page-{self.instance}", reason=reason)
                )
            for run_id, notice in news.notices:
                self._reception.send(run_id, notice)
            for run_id, tables in news.unconfirmed_tables.items():
                self._awake(run_id).repeat(tables)
        self._tidy(now)
        return moved

    def _tidy(self, now: float) -> None:
        if now - self._tidied_at < _TIDY_SECONDS:
            return
        self._tidied_at = now
        try:
            self._deliveries.show(self.journal.tidy())
        except JournalError as error:
            _LOG.warning("the journal cannot be tidied up now: %s", error)

    def _lost(self, pipeline: KnownRun, now: float, *, at_once: bool) -> dict[str, str]:
        lost = self._trainers.lost(pipeline.open_incarnations, self._reception.last_heard, now, at_once=at_once)
        for name, reason in lost.items():
            made, held = self._reception.account(name)
            known = f"it had made {made} messages when it was last heard" if made else "it was not heard by this worker"
            lost[name] = f"{reason}; {known}, {held} are here"
        return lost

    def _take_in(self, now: float) -> bool:
        for event in self._feed.take_events():
            pipeline = self._pipeline_of(event.run_id)
            if isinstance(event, Refused):
                pipeline.refuse(event.incarnation, event.rank, event.sequence)
            else:
                pipeline.refresh()
                self._trainers.refresh(event.incarnation)
        moved = False
        try:
            for _ in range(_TAKES_PER_TURN):
                messages = self._feed.take()
                moved = moved or bool(messages)
                self._take_messages(messages, now)
                if not messages:
                    break
        except JournalError as error:
            self._unread = str(error)
        return moved

    def _take_messages(self, messages: Sequence[Journaled], now: float) -> None:
        heard, awake = self._heard.take, dict[str, RunPipeline]()
        for each in messages:
            heard(each)
            run_id = each.envelope.run_id
            if isinstance(each.message, Notice):
                self._requests.heard(run_id, each.message)
            pipeline = awake.get(run_id)
            if pipeline is None:
                if self._is_settled(each):
                    continue
                pipeline = awake[run_id] = self._pipeline_of(run_id)
            pipeline.add(each, now)

    def _ask(self, pipeline: KnownRun, command: Command) -> None:
        newest = pipeline.newest
        self._requests.ask(
            pipeline.run_id,
            command,
            world_size=newest.world_size,
            newest_step=self._heard.newest_step(pipeline.run_id),
        )

    def _is_settled(self, each: Journaled) -> bool:
        """Whether a message is read back for another run's sake: this one's was accounted for before the start."""
        known = self._pipelines.get(each.envelope.run_id)
        return each.arrival < self._recovered_arrival and isinstance(known, SettledRun)

    def _pipeline_of(self, run_id: str) -> RunPipeline:
        pipeline = self._awake(run_id)
        self._deliveries.open(run_id)
        return pipeline

    def _awake(self, run_id: str) -> RunPipeline:
        known = self._pipelines.get(run_id)
        if not isinstance(known, RunPipeline):
            known = self._pipelines[run_id] = self._pipeline(run_id)
        return known

    # ------------------------------------------------------------------------------------------------ health

    def report(self) -> dict[str, Any]:
        """Return the worker's health and figures; any thread may call it."""
        now = time.monotonic()
        reasons = [
            text
            for text, is_so in (
                ("the receiver has stopped", not self._receiver.is_alive),
                ("the receiver is stuck", now - self._receiver.last_turn > _STUCK_SECONDS),
                ("the loop is stuck", now - self._last_turn > 3 * _STUCK_SECONDS),
                (self._reception.failure, bool(self._reception.failure)),
                (self._unreadable, bool(self._unreadable)),
                (self.journal.trouble, bool(self.journal.trouble)),
            )
            if is_so
        ]
        try:
            journal_state = self.journal.statistics()
        except JournalError as error:
            journal_state = {}
            reasons.append(str(error))
        report = {
            "healthy": not reasons,
            "reason": "; ".join(reasons),
            "pid": os.getpid(),
            "instance": self.instance,
            "endpoint": self.address,
            "journal": str(self.journal.folder),
            "started_at": self._started_at,
            "receiver": dict(self._receiver.statistics()),
            "journal_state": journal_state,
            "feed": {"held_bytes": self._feed.held_bytes, "read_back": self._feed.read_back},
            "runs": {run_id: self._run_report(pipeline, now) for run_id, pipeline in list(self._pipelines.items())},
            "sinks": self._deliveries.statistics(),
        }
        return {**report, "warnings": warnings(report)}

    def _run_report(self, pipeline: KnownRun, now: float) -> dict[str, Any]:
        newest = pipeline.newest
        heard_at = self._reception.last_heard.get(newest.incarnation)
        closed_step, lag_seconds = pipeline.standing(now)
        return {
            **pipeline.statistics(),
            **self._heard.report(pipeline.run_id),
            "attempt": newest.attempt,
            "world_size": newest.world_size,
            "is_ended": pipeline.is_ended,
            "closed_step": closed_step,
            "lag_seconds": round(lag_seconds, 3),
            "seconds_since_heard": None if heard_at is None else round(max(0.0, now - heard_at), 3),
        }


def _places(config: WorkerConfig) -> tuple[Path, Path]:
    """Return the folders for what the sinks write, and for the journal."""
    if config.out is not None:
        return config.out, config.journal or config.out / "journal"
    if config.journal is not None:
        return config.journal.parent, config.journal
    out = new_run_folder(home_folder())
    return out, out / "journal"
