"""A recording judged as a worker judges a run, by the worker's own code, so that thresholds change without training.

`Worker` is the one door to it: frames become assembled steps, these go through the metrics, the user's rules and the
watch, in the order of the projection.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from benchmarks.detection.recording import read_frames

from sidestep.protocol.frames import Envelope, decode
from sidestep.protocol.messages import Blob, Hello, StepEnd
from sidestep.worker.contexts import build_context
from sidestep.worker.detectors.base import Observation
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.user_rules import UserRules
from sidestep.worker.incident_causes import CAUSES, UNKNOWN
from sidestep.worker.intake.assembly import Journaled, assemble, step_of
from sidestep.worker.intake.decisions import ContextRecord
from sidestep.worker.intake.index import Index
from sidestep.worker.metrics.answer_counts import AnswerCounts
from sidestep.worker.records import AssembledStep, RunContext, StepClosing
from sidestep.worker.settings import RunSettings
from sidestep.worker.step_metrics import measure_step
from sidestep.worker.text.incident_table import INCIDENT_KEY
from sidestep.worker.watch import Watch, WatchVerdict

LEVELS = ("info", "warning", "critical")


@dataclass(slots=True, kw_only=True)
class JudgedIncident:
    """One incident, as people were told of it."""

    number: int
    name: str
    level: str
    opened_step: int
    first_step: int
    told: list[tuple[int, str]] = field(default_factory=list)
    """(step, level) of each announcement."""
    causes: list[tuple[int, str]] = field(default_factory=list)
    """(step, cause's name), each time that it changed."""
    detectors: dict[str, int] = field(default_factory=dict)
    """Detector to the step at which it spoke."""


@dataclass(slots=True, kw_only=True)
class Judged:
    """What a worker made of a run."""

    incidents: list[JudgedIncident] = field(default_factory=list)
    num_steps: int = 0
    worker_seconds: float = 0.0
    """CPU time of metrics, rules and watch; reading and decoding are not in it."""
    intake_seconds: float = 0.0
    """CPU time of decoding and assembling."""
    num_notices: int = 0
    """Notices of the watch: a detector that failed says so in one."""


class _Tables:
    """What `build_context` asks of an index: Hellos and tables, held in memory."""

    def __init__(self) -> None:
        self.bodies: dict[int, bytes] = {}
        self.blobs: dict[str, bytes] = {}

    def hellos(self, _incarnation: str) -> Mapping[int, bytes]:
        """Return rank to its Hello's frame."""
        return self.bodies

    def blob(self, digest: str) -> bytes | None:
        """Return a table."""
        return self.blobs.get(digest)


class _Run:
    """Frames in; context and assembled steps out. A step closes when each rank's `StepEnd` is there."""

    def __init__(self) -> None:
        self._tables = _Tables()
        self._open: dict[int, dict[tuple[int, int], Journaled]] = {}
        self._ends: dict[int, int] = {}
        self._num_closed = 0
        self._context: RunContext | None = None
        self.envelope: Envelope | None = None

    @property
    def context(self) -> RunContext:
        """What Hellos and tables say; they all come before the first step."""
        if self._context is None:
            envelope = self.envelope or Envelope(run_id="", incarnation="", rank=0)
            record = ContextRecord(
                run_id=envelope.run_id,
                attempt=0,
                revision=0,
                incarnation=envelope.incarnation,
                ranks=tuple(sorted(self._tables.bodies)),
                missing=(),
            )
            self._context, _ = build_context(cast("Index", self._tables), record)
        return self._context

    def take(self, frame: bytes) -> AssembledStep | None:
        """Take a frame in; returns the step that it completes."""
        envelope, message = decode(frame)
        self.envelope = self.envelope or envelope
        if isinstance(message, Hello):
            self._tables.bodies[envelope.rank] = frame
        elif isinstance(message, Blob):
            self._tables.blobs[message.digest] = message.content
        step = step_of(message)
        if step < 0 or not envelope.sequence:
            return None
        held = Journaled(envelope=envelope, message=message)
        self._open.setdefault(step, {})[held.key] = held
        if not isinstance(message, StepEnd):
            return None
        self._ends[step] = self._ends.get(step, 0) + 1
        return self._closed(step) if self._ends[step] == len(self._tables.bodies) else None

    def _closed(self, step: int) -> AssembledStep:
        messages = self._open.pop(step)
        self._num_closed += 1
        closing = StepClosing(
            run_id=self.context.run_id,
            attempt=0,
            step=step,
            reason="complete",
            incarnation=self.envelope.incarnation if self.envelope is not None else "",
            parts=tuple(sorted(messages)),
            ranks_expected=len(self._tables.bodies),
            closed_number=self._num_closed,
        )
        return assemble(closing, messages)


def assembled_steps(path: Path) -> Iterator[tuple[AssembledStep, RunContext]]:
    """Yield the steps of a recording with the run's context; raises as `read_frames` does."""
    run = _Run()
    for frame in read_frames(path):
        step = run.take(frame)
        if step is not None:
            yield step, run.context


class Worker:
    """Metrics, the user's rules and the watch, as a run's projection asks them."""

    def __init__(self, context: RunContext, settings: DetectorSettings | None) -> None:
        """Begin a run; `settings` are the product's own where there are none."""
        self._context = context
        self._settings = RunSettings.from_map(context.settings)
        self._answers = AnswerCounts()
        self._rules = UserRules()
        self.watch = Watch(settings)

    def judge(self, step: AssembledStep) -> WatchVerdict:
        """Return what the watch says of a step."""
        measured = measure_step(step, self._context, self._settings, self._answers)
        verdict = self._rules.observe(
            Observation(
                attempt=step.attempt,
                step=step.step,
                context=self._context,
                settings=self._settings,
                values=measured.found.values,
                generated=measured.generated,
            )
        )
        return self.watch.observe(
            step, self._context, generated=measured.generated, verdict=verdict.values, findings=verdict.findings
        )


def judge(path: Path, settings: DetectorSettings | None = None) -> Judged:
    """Judge a recording; raises as `read_frames` does."""
    judged = Judged()
    worker: Worker | None = None
    before = time.thread_time()
    for step, context in assembled_steps(path):
        worker = worker or Worker(context, settings)
        assembled = time.thread_time()
        judged.intake_seconds += assembled - before
        verdict = worker.judge(step)
        before = time.thread_time()
        judged.worker_seconds += before - assembled
        judged.num_steps += 1
        judged.num_notices += len(verdict.notices)
        _note(judged, step.step, verdict)
    if worker is not None:
        _note_evidence(judged, worker.watch.state())
    return judged


def _note(judged: Judged, step: int, verdict: WatchVerdict) -> None:
    """Keep what was told of incidents: rows of their table, and the level of what was said aloud."""
    known = {incident.number: incident for incident in judged.incidents}
    for table in verdict.tables:
        if table.key != INCIDENT_KEY:
            continue
        for cells in table.rows:
            row = dict(zip(table.columns, cells, strict=True))
            incident = known.get(row["incident"])
            if incident is None:
                incident = _new_incident(row)
                known[incident.number] = incident
                judged.incidents.append(incident)
            incident.name, incident.level = row["name"], row["severity"]
            cause = _CAUSE_NAMES.get(row["likely_cause"], UNKNOWN.name)
            if not incident.causes or incident.causes[-1][1] != cause:
                incident.causes.append((step, cause))
            _add_detectors(incident, str(row["values"]))
    for each in verdict.announcements:
        kind, _, rest = each.code.partition(":")
        if kind != "incident":
            continue
        number, _, name = rest.partition(":")
        incident = known.get(int(number))
        if incident is None:  # of several incidents that change at a step the first alone has a row
            incident = JudgedIncident(
                number=int(number), name=name, level=each.level, opened_step=step, first_step=step
            )
            judged.incidents.append(incident)
        incident.told.append((step, each.level))


def _new_incident(row: Mapping[str, Any]) -> JudgedIncident:
    return JudgedIncident(
        number=row["incident"],
        name=row["name"],
        level=row["severity"],
        opened_step=row["opened_step"],
        first_step=row["first_step"],
    )


def _add_detectors(incident: JudgedIncident, values: str) -> None:
    """Read `detector value (limit x) at step` of the table's cell."""
    for part in values.split("; "):
        name, _, rest = part.partition(" ")
        step = rest.rpartition(" at ")[2]
        if step.isdecimal():
            incident.detectors.setdefault(name, int(step))


def _note_evidence(judged: Judged, state: Any) -> None:
    """Evidence that came after an incident was last told of."""
    known = {incident.number: incident for incident in judged.incidents}
    for saved in state["incidents"]["open"]:
        for each in saved["evidence"]:
            if saved["number"] in known:
                known[saved["number"]].detectors.setdefault(each["detector"], int(each["step"]))


_CAUSE_NAMES = {each.text: each.name for each in CAUSES}
