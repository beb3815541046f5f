"""A recording judged as a worker judges a run, by the worker's own code, so that thresholds change without training.

Frames become assembled steps, these go through the run's projection, and what is read is what leaves a worker: outbox
entries, that is the rows of the incidents' table and what both consoles are told.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from benchmarks.detection.recording import read_frames

from sidestep.protocol.frames import Envelope, decode
from sidestep.protocol.messages import Blob, Hello, StepEnd
from sidestep.protocol.tables import decode_table
from sidestep.worker.contexts import build_context
from sidestep.worker.incident_causes import CAUSES, UNKNOWN
from sidestep.worker.intake.assembly import Journaled, assemble, step_of
from sidestep.worker.intake.decisions import ContextRecord
from sidestep.worker.intake.index import Index
from sidestep.worker.outbox import OutboxEntry
from sidestep.worker.projection import RunProjection
from sidestep.worker.records import AssembledStep, RunContext, StepClosing
from sidestep.worker.text.incident_table import INCIDENT_KEY


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
    """CPU time of the projection: metrics, rules, watch and outbox entries; reading and decoding are not in it."""
    intake_seconds: float = 0.0
    """CPU time of decoding and assembling."""
    num_failures: int = 0
    """Times that a detector of one's own failed."""


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


def judge(path: Path, changes: Mapping[str, str] | None = None) -> Judged:
    """Judge a recording; raises as `read_frames` does.

    Args:
        path: the file.
        changes: thresholds that are others than the product's, `cal_up.threshold` to text.
    """
    judged = Judged()
    projection: RunProjection | None = None
    before = time.thread_time()
    for step, context in assembled_steps(path):
        if projection is None:
            told = {**context.settings.get("detectors", {}), **(changes or {})}
            projection = RunProjection(replace(context, settings={**context.settings, "detectors": told}))
        assembled = time.thread_time()
        judged.intake_seconds += assembled - before
        entries = projection.project(step).entries
        before = time.thread_time()
        judged.worker_seconds += before - assembled
        judged.num_steps += 1
        _note(judged, step.step, entries)
    if projection is not None:
        _note_evidence(judged, projection.state())
    return judged


def _note(judged: Judged, step: int, entries: Sequence[OutboxEntry]) -> None:
    """Keep what people get of incidents: rows of their table, and the level of what was said aloud."""
    known = {incident.number: incident for incident in judged.incidents}
    for entry in entries:
        if entry.kind == "table":
            payload = entry.value()
            if payload["key"] == INCIDENT_KEY:
                for cells in payload["rows"]:
                    _take_row(judged, known, step, dict(zip(payload["columns"], cells, strict=True)))
    for entry in entries:
        if entry.kind == "notice":
            payload = entry.value()
            _take_notice(judged, known, step, str(payload["code"]), str(payload["level"]))


def _take_row(judged: Judged, known: dict[int, JudgedIncident], step: int, row: Mapping[str, Any]) -> None:
    incident = known.get(row["incident"])
    if incident is None:
        incident = JudgedIncident(
            number=row["incident"],
            name=row["name"],
            level=row["severity"],
            opened_step=row["opened_step"],
            first_step=row["first_step"],
        )
        known[incident.number] = incident
        judged.incidents.append(incident)
    incident.name, incident.level = row["name"], row["severity"]
    cause = _CAUSE_NAMES.get(row["likely_cause"], UNKNOWN.name)
    if not incident.causes or incident.causes[-1][1] != cause:
        incident.causes.append((step, cause))
    for part in str(row["values"]).split("; "):  # `detector value (limit x) at step`
        name, _, rest = part.partition(" ")
        spoken = rest.rpartition(" at ")[2]
        if spoken.isdecimal():
            incident.detectors.setdefault(name, int(spoken))


def _take_notice(judged: Judged, known: dict[int, JudgedIncident], step: int, code: str, level: str) -> None:
    kind, _, rest = code.partition(":")
    number, _, name = rest.partition(":")
    if kind == "detector_failed":
        judged.num_failures += 1
    if kind != "incident" or name.endswith(":why"):
        return
    incident = known.get(int(number))
    if incident is None:  # of several incidents that change at a step the first alone has a row
        incident = JudgedIncident(number=int(number), name=name, level=level, opened_step=step, first_step=step)
        known[incident.number] = incident
        judged.incidents.append(incident)
    incident.told.append((step, level))


def _note_evidence(judged: Judged, state: bytes) -> None:
    """Take in evidence that came after an incident was last told of: the projection's state has it."""
    known = {incident.number: incident for incident in judged.incidents}
    pieces: Any = decode_table(state)
    watch: Any = decode_table(pieces["pieces"]["watch"])
    for saved in watch["incidents"]["open"]:
        for each in saved["evidence"]:
            if saved["number"] in known:
                known[saved["number"]].detectors.setdefault(each["detector"], int(each["step"]))


_CAUSE_NAMES = {each.text: each.name for each in CAUSES}
