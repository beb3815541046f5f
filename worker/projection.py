"""Steps in, outbox entries out: the one place where what was measured becomes what a run shows.

Deterministic: no clock, no I/O; the same steps, contexts and ends give the same bytes, live and in a replay
(docs/delivery.md, section 3). The order of a step's entries is fixed: the run's opening, rows, tables, alerts, notices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

from sidestep.protocol.errors import DecodeError
from sidestep.protocol.messages import Hello, Json, Kind, Notice
from sidestep.protocol.tables import decode_table, encode_table
from sidestep.worker.console_lines import REMEMBERED, generation_line, key_metrics_line
from sidestep.worker.detectors.base import Detector, Finding, Observation
from sidestep.worker.detectors.user_rules import UserRules
from sidestep.worker.metrics.answer_counts import AnswerCounts
from sidestep.worker.metrics.measurement import Value, notice_once
from sidestep.worker.notice_board import NoticeBoard
from sidestep.worker.outbox import OutboxEntry, entry
from sidestep.worker.records import AssembledStep, RunContext
from sidestep.worker.run_accounts import RunAccounts
from sidestep.worker.run_entry import run_entry
from sidestep.worker.scalar_rows import scalar_rows
from sidestep.worker.settings import RunSettings
from sidestep.worker.step_facts import changed, companion_facts, telling_facts
from sidestep.worker.step_metrics import StepMetrics, measure_step
from sidestep.worker.text.clipping import clip
from sidestep.worker.text.tables import table_payload

STATE_VERSION: Final = 2
READ_VERSIONS: Final = (1, STATE_VERSION)
"""Version 1 had no accounts but the drops that the steps' ends tell."""
LEVELS: Final = ("info", "warning", "critical")


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """What one step, or an end, makes the run say."""

    entries: tuple[OutboxEntry, ...] = ()
    notices: tuple[Notice, ...] = ()
    """Lines for the trainer's console; the worker's own console finds them among the entries."""


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A projection in the making."""

    unix_time: float
    attempt: int
    step: int
    rows: list[OutboxEntry] = field(default_factory=list)
    tables: list[OutboxEntry] = field(default_factory=list)
    alerts: list[OutboxEntry] = field(default_factory=list)
    notices: list[OutboxEntry] = field(default_factory=list)
    answers: list[Notice] = field(default_factory=list)

    def add_row(self, values: Mapping[str, Value], step: int | None = None) -> None:
        head = {"_timestamp": self.unix_time, "train/step": self.step if step is None else step}
        self.rows.append(entry("row", {**values, **head, "train/attempt": self.attempt}))

    def show(self, notice: Notice, *, to_trainer: bool = True) -> None:
        level = notice.level if notice.level in LEVELS else "warning"
        self.notices.append(entry("notice", {"text": clip(notice.text), "level": level, "code": clip(notice.code)}))
        if to_trainer:
            self.answers.append(notice)

    def finished(self, opening: Sequence[OutboxEntry]) -> Projection:
        return Projection(
            entries=(*opening, *self.rows, *self.tables, *self.alerts, *self.notices), notices=tuple(self.answers)
        )


class RunProjection:
    """One run's projection, over all its attempts. ``state()`` after each step is all that a restart needs."""

    def __init__(self, context: RunContext, hello: Hello | None = None) -> None:
        """Begin a run.

        Args:
            context: what the first attempt's Hellos and tables say; ``adopt`` takes later ones.
            hello: whose project, name, tags, configuration and environment the run's first entry carries.
        """
        self._context = context
        self._hello = hello
        self._settings = RunSettings.from_map(context.settings)
        self._answers = AnswerCounts()
        self._detectors: tuple[Detector, ...] = (UserRules(),)
        self._board = NoticeBoard()
        self._is_open = False
        self._attempt = -1
        self._unix_time = 0.0
        self._remembered: dict[str, tuple[int, Value]] = {}
        self._accounts = RunAccounts()
        self._lost_written: dict[str, Value] = {}

    def adopt(self, context: RunContext, hello: Hello | None = None) -> None:
        """Go on with what a later attempt, or a later table, says of the run."""
        self._context = context
        self._hello = hello or self._hello
        self._settings = RunSettings.from_map(context.settings)

    def project(self, step: AssembledStep) -> Projection:
        """Return the entries of one closed step, and the lines that go back to the trainer."""
        self._unix_time = step.unix_time if 0 < step.unix_time < math.inf else self._unix_time
        draft = _Draft(unix_time=self._unix_time, attempt=step.attempt, step=step.step)
        opening = self._open()
        self._begin(step, draft)
        self._accounts.take(step)
        for notice in step.notices:
            if self._board.is_new(notice):
                draft.show(notice, to_trainer=False)
        self._tell_tokenizer(draft)
        self._project_measured(step, draft)
        return draft.finished(opening)

    def finish(
        self,
        exit_code: int = 0,
        reason: str = "",
        *,
        attempt: int = 0,
        unix_time: float = 0.0,
        newest_step: int = -1,
        tail_unknown: bool = False,
    ) -> Projection:
        """Return the entries of an attempt's end; ``tail_unknown`` where the trainer went without saying so."""
        draft = _Draft(unix_time=unix_time or self._unix_time, attempt=attempt, step=newest_step)
        opening = self._open()
        if tail_unknown:
            draft.add_row({"sidecar/tail_unknown": 1, **self._accounts.figures(), **self._accounts.losses()})
        repeats = self._board.repeats()
        for code, count in repeats.items():
            text = f"the notice {code!r} came up {count} more times"
            draft.show(Notice(text=text, code=f"repeats:{code}", level="info"), to_trainer=False)
        made = draft.finished(opening)
        end = entry("finish", {"exit_code": exit_code, "reason": reason, "attempt": attempt})
        return Projection(entries=(*made.entries, end))

    def state(self) -> bytes:
        """Return all that ``restore`` needs; equal states are equal bytes."""
        return encode_table(
            {
                "version": STATE_VERSION,
                "is_open": self._is_open,
                "attempt": self._attempt,
                "unix_time": self._unix_time,
                "remembered": dict(sorted(self._remembered.items())),
                "accounts": self._accounts.state(),
                "lost_written": dict(sorted(self._lost_written.items())),
                "notices": self._board.state(),
                "answers": self._answers.state(),
                "detectors": {detector.name: detector.state() for detector in self._detectors},
            }
        )

    def restore(self, state: bytes) -> None:
        """Take over a state.

        Raises:
            ValueError: these bytes are no state of this version.
        """
        try:
            self._take(cast("dict[str, Any]", decode_table(state)))
        except (DecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a state of a projection of version {STATE_VERSION}: {error!r}") from error

    def _take(self, saved: Mapping[str, Any]) -> None:
        if saved["version"] not in READ_VERSIONS:
            raise ValueError(f"version {saved['version']}")
        self._is_open = bool(saved["is_open"])
        self._attempt = int(saved["attempt"])
        self._unix_time = float(saved["unix_time"])
        self._remembered = {key: (int(at), value) for key, (at, value) in saved["remembered"].items()}
        if saved["version"] == 1:
            self._accounts.restore_drops(saved["dropped"])
        else:
            self._accounts.restore(saved["accounts"])
        self._lost_written = dict(saved["lost_written"])
        self._board.restore(saved["notices"])
        self._answers.restore(saved["answers"])
        for detector in self._detectors:
            if detector.name in saved["detectors"]:
                detector.restore(saved["detectors"][detector.name])

    def _open(self) -> tuple[OutboxEntry, ...]:
        if self._is_open:
            return ()
        self._is_open = True
        return (run_entry(self._context, self._hello),)

    def _begin(self, step: AssembledStep, draft: _Draft) -> None:
        """At a new attempt's first step, return to what was known before it (docs/delivery.md, section 1)."""
        if step.attempt <= self._attempt:
            return
        self._attempt = step.attempt
        first = step.step
        for detector in self._detectors:
            detector.begin(step.attempt, first)
        if not self._answers.begin(step.attempt, first):
            text = (
                f"resumed at step {first}, further back than single steps are remembered: data/* of the epoch may lack "
                "answers of the steps before it"
            )
            self._tell(notice_once("answers_rolled_back_far", text, first), draft)

    def _tell(self, notice: Notice, draft: _Draft) -> None:
        if self._board.is_new(notice):
            draft.show(notice)

    def _tell_tokenizer(self, draft: _Draft) -> None:
        problem = str(getattr(self._context.text, "problem", ""))
        if problem:
            self._tell(notice_once("tokenizer_unusable", problem, draft.step), draft)

    def _project_measured(self, step: AssembledStep, draft: _Draft) -> None:
        measured = measure_step(step, self._context, self._settings, self._answers)
        found = measured.found
        findings = self._detect(step, measured)
        facts, lost = telling_facts(step), self._accounts.losses()
        companions = {**companion_facts(step), **self._accounts.figures()}
        own = {**found.values, **facts}
        logged = scalar_rows(step.parts.get(Kind.SCALARS, ()), {**own, **companions, **lost})
        if logged.num_nonfinite:
            own["sidecar/nonfinite_scalars"] = logged.num_nonfinite
        if logged.num_left_out:
            own["sidecar/scalars_left_out"] = logged.num_left_out
        first, *further = logged.rows
        if own or first or changed(lost, self._lost_written):
            draft.add_row({**companions, **lost, **first, **own})
            self._lost_written = lost
        for row in further:
            draft.add_row(row)
        self._remembered.update({key: (step.step, found.values[key]) for key in REMEMBERED if key in found.values})
        self._add_late_rows(step, draft)
        for table in found.tables:
            payload = table_payload(table, attempt=step.attempt, step=step.step, unix_time=self._unix_time)
            draft.tables.append(entry("table", payload))
        for notice in found.notices:
            self._tell(notice, draft)
        for finding in findings:
            self._raise_alert(finding, draft)
        if measured.generated is not None:
            self._show_evaluation({**companions, **found.values}, draft)

    def _detect(self, step: AssembledStep, measured: StepMetrics) -> list[Finding]:
        findings: list[Finding] = []
        for detector in self._detectors:
            verdict = detector.observe(
                Observation(
                    attempt=step.attempt,
                    step=step.step,
                    context=self._context,
                    settings=self._settings,
                    values=measured.found.values,
                    generated=measured.generated,
                )
            )
            measured.found.values.update(verdict.values)
            findings.extend(verdict.findings)
        return findings

    def _add_late_rows(self, step: AssembledStep, draft: _Draft) -> None:
        """What the trainer logged is shown however late it came: in a row of its own, under its own step."""
        late = [part for part in step.late_parts if part.message.kind is Kind.SCALARS]
        for part in late:
            for row in scalar_rows([part], {}).rows:
                if row:
                    draft.add_row(row, step=getattr(part.message, "step", step.step))

    def _raise_alert(self, finding: Finding, draft: _Draft) -> None:
        alert: dict[str, Json] = {
            "id": f"{self._context.run_id}-{draft.attempt}-{draft.step}-{finding.code}",
            "title": finding.title,
            "text": f"{finding.line} (step {draft.step}; {finding.detail})",
            "level": "critical",
            "step": draft.step,
        }
        draft.alerts.append(entry("alert", alert))
        draft.show(Notice(text=finding.line, code=finding.code, level="critical", step=draft.step))

    def _show_evaluation(self, values: Mapping[str, Value], draft: _Draft) -> None:
        length = generation_line(draft.step, values)
        lines = [*([length] if length else []), key_metrics_line(draft.step, values, self._remembered)]
        for text in lines:
            draft.show(Notice(text=text, code="evaluation", level="info", step=draft.step))
