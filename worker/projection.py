"""Steps in, outbox entries out: the one place where what was measured becomes what a run shows.

Deterministic: no clock, no I/O; the same steps, contexts and ends give the same bytes, live and in a replay
(docs/delivery.md, section 3). The order of a step's entries is fixed: the run's opening, rows, tables, alerts, notices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, cast

from sidestep.protocol.errors import DecodeError
from sidestep.protocol.messages import Command, Hello, Json, Kind, Notice
from sidestep.protocol.tables import decode_table, encode_table
from sidestep.worker.console_lines import REMEMBERED, generation_line, key_metrics_line
from sidestep.worker.detectors.base import Detector, Finding, LargeState, Observation
from sidestep.worker.detectors.user_rules import UserRules
from sidestep.worker.intake.state_history import SNAPSHOT_MARK
from sidestep.worker.metrics.answer_counts import AnswerCounts
from sidestep.worker.metrics.answers import count_answers
from sidestep.worker.metrics.measurement import Value, notice_once
from sidestep.worker.notice_board import NoticeBoard
from sidestep.worker.outbox import OutboxEntry, entry
from sidestep.worker.rank_facts import missing_ranks, rank_facts
from sidestep.worker.records import AssembledStep, Part, RunContext
from sidestep.worker.run_accounts import RunAccounts
from sidestep.worker.run_entry import run_entry
from sidestep.worker.scalar_rows import scalar_rows
from sidestep.worker.settings import RunSettings
from sidestep.worker.state_pieces import ChangedPieces, Piece
from sidestep.worker.step_facts import changed, companion_facts, telling_facts
from sidestep.worker.step_metrics import StepMetrics, measure_step
from sidestep.worker.text.clipping import clip
from sidestep.worker.text.tables import table_payload
from sidestep.worker.watch import Announcement, Request, WatchVerdict
from sidestep.worker.watch_making import judges_otherwise, make_watch

STATE_VERSION: Final = 3
READ_VERSIONS: Final = (1, 2, STATE_VERSION)
"""Version 1 had no accounts but the drops that the steps' ends tell; 1 and 2 are one map, 3 is in pieces."""
LEVELS: Final = ("info", "warning", "critical")


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """What one step, or an end, makes the run say."""

    entries: tuple[OutboxEntry, ...] = ()
    notices: tuple[Notice, ...] = ()
    """Lines for the trainer's console; the worker's own console finds them among the entries."""
    requests: tuple[Command, ...] = ()
    """What the trainer is asked for; a replay asks nobody."""


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
    requests: list[Command] = field(default_factory=list)

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
            entries=(*opening, *self.rows, *self.tables, *self.alerts, *self.notices),
            notices=tuple(self.answers),
            requests=tuple(self.requests),
        )


def _large_ones(detectors: Sequence[Detector]) -> Mapping[str, LargeState]:
    """Return those that cut their state into pieces, by name; asked once, as asking takes as long as a detector."""
    return {detector.name: detector for detector in detectors if isinstance(detector, LargeState)}


@contextmanager
def _restoring() -> Iterator[None]:
    try:
        yield
    except (DecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a state of a projection of version {STATE_VERSION}: {error!r}") from error


class RunProjection:
    """One run's projection, over all its attempts. What ``changed_pieces`` gives is all that a restart needs."""

    def __init__(
        self,
        context: RunContext,
        hello: Hello | None = None,
        *,
        detectors: Sequence[Detector] | None = None,
        own_detectors: Sequence[str] = (),
    ) -> None:
        """Begin a run.

        Args:
            context: what the first attempt's Hellos and tables say; ``adopt`` takes later ones.
            hello: whose project, name, tags, configuration and environment the run's first entry carries.
            detectors: fresh ones that judge before the watch does; the user's rules where none are named.
            own_detectors: detectors from elsewhere, ``package.module:Class`` each.

        Raises:
            ValueError: a detector from elsewhere cannot be loaded; the text says which and why.
        """
        self._context = context
        self._hello = hello
        self._settings = RunSettings.from_map(context.settings)
        self._answers = AnswerCounts()
        self._detectors: tuple[Detector, ...] = (UserRules(),) if detectors is None else tuple(detectors)
        self._large = _large_ones(self._detectors)
        self._own_detectors = tuple(own_detectors)
        self._watch, self._threshold_problems = make_watch(self._settings, self._own_detectors)
        self._changed = ChangedPieces()
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
        settings, self._settings = self._settings, RunSettings.from_map(context.settings)
        if judges_otherwise(settings, self._settings):
            known = self._watch.state()
            self._watch, self._threshold_problems = make_watch(self._settings, self._own_detectors)
            self._watch.restore(known)
            self._changed.forget()

    def project(self, step: AssembledStep) -> Projection:
        """Return the entries of one closed step, and the lines that go back to the trainer."""
        self._unix_time = step.unix_time if 0 < step.unix_time < math.inf else self._unix_time
        draft = _Draft(unix_time=self._unix_time, attempt=step.attempt, step=step.step)
        opening = self._open()
        self._begin(step)
        self._accounts.take(step)
        for notice in step.notices:
            if self._board.is_new(notice):
                draft.show(notice, to_trainer=False)
        self._tell_setup(draft)
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
            draft.add_row({"sidecar/tail_unknown": 1, **self._accounts.last_words()})
        repeats = self._board.repeats()
        for code, count in repeats.items():
            text = f"the notice {code!r} came up {count} more times"
            draft.show(Notice(text=text, code=f"repeats:{code}", level="info"), to_trainer=False)
        if attempt >= self._attempt:
            for table in self._watch.open_rows():
                payload = table_payload(table, attempt=attempt, step=newest_step, unix_time=draft.unix_time)
                draft.tables.append(entry("table", payload))
        made = draft.finished(opening)
        end = entry("finish", {"exit_code": exit_code, "reason": reason, "attempt": attempt})
        return Projection(entries=(*made.entries, end))

    # ------------------------------------------------------------------------------------------------ state

    def _pieces(self) -> list[Piece]:
        made = [
            Piece(name=SNAPSHOT_MARK, make=self._run_state),
            Piece(name="measured", make=self._measured_state),
            Piece(name="watch", make=self._watch.state),
        ]
        for detector in self._detectors:
            name = f"detector/{detector.name}"
            made.append(Piece(name=name, make=detector.state))
            if detector.name in self._large:
                large = self._large[detector.name]
                made += [
                    Piece(name=f"{name}/{piece}", make=partial(large.piece, piece), revision=revision)
                    for piece, revision in large.revisions().items()
                ]
        return made

    def _run_state(self) -> Json:
        """What lasts over all attempts: what was said and counted is not taken back."""
        return {
            "version": STATE_VERSION,
            "is_open": self._is_open,
            "attempt": self._attempt,
            "unix_time": self._unix_time,
            "accounts": self._accounts.state(),
            "lost_written": dict(sorted(self._lost_written.items())),
            "notices": self._board.state(),
        }

    def _measured_state(self) -> Json:
        """What is as it was before a step where a trainer goes back to that step; the detectors are so too."""
        return {"remembered": dict(sorted(self._remembered.items())), "answers": self._answers.state()}

    def changed_pieces(self, *, is_snapshot: bool = False) -> dict[str, bytes]:
        """Return the pieces of the state that have changed since they were asked for last, or restored.

        With ``is_snapshot`` the piece ``SNAPSHOT_MARK`` is among them in any case: where it stands, a state was taken.
        """
        return self._changed.take(self._pieces(), SNAPSHOT_MARK if is_snapshot else "")

    def state(self) -> bytes:
        """Return all that ``restore`` needs; equal states are equal bytes."""
        return encode_table({"pieces": {piece.name: encode_table(piece.make()) for piece in self._pieces()}})

    def restore(self, state: bytes) -> None:
        """Take over a state, of an older version too.

        Raises:
            ValueError: these bytes are no state of a version that this one reads.
        """
        with _restoring():
            saved = cast("dict[str, Any]", decode_table(state))
            if "pieces" in saved:
                self.restore_pieces(saved["pieces"])
            else:
                self._take(saved, saved, {f"detector/{name}": each for name, each in saved["detectors"].items()})

    def restore_pieces(self, pieces: Mapping[str, bytes]) -> None:
        """Take over a state in pieces; raises ValueError as ``restore`` does."""
        with _restoring():
            tables = {name: cast("dict[str, Any]", decode_table(body)) for name, body in pieces.items()}
            self._take(tables[SNAPSHOT_MARK], tables["measured"], tables)
            self._changed.know(self._pieces(), pieces)

    def _take(self, run: Mapping[str, Any], measured: Mapping[str, Any], detectors: Mapping[str, Any]) -> None:
        if run["version"] not in READ_VERSIONS:
            raise ValueError(f"version {run['version']}")
        self._is_open = bool(run["is_open"])
        self._attempt = int(run["attempt"])
        self._unix_time = float(run["unix_time"])
        if run["version"] == 1:
            self._accounts.restore_drops(run["dropped"])
        else:
            self._accounts.restore(run["accounts"])
        self._lost_written = dict(run["lost_written"])
        self._board.restore(run["notices"])
        self._remembered = {key: (int(at), value) for key, (at, value) in measured["remembered"].items()}
        self._answers.restore(measured["answers"])
        if "watch" in detectors:  # not in a state from before there was one
            self._watch.restore(detectors["watch"])
        for detector in self._detectors:
            name = f"detector/{detector.name}"
            if name in detectors:
                detector.restore(detectors[name])
            if detector.name in self._large:
                large = self._large[detector.name]
                for piece in large.revisions():
                    if f"{name}/{piece}" in detectors:
                        large.restore_piece(piece, detectors[f"{name}/{piece}"])

    def go_back(self, earlier: RunProjection, notice: Notice | None = None) -> Projection:
        """Know again what ``earlier`` knows, which is not used any more; what was said and counted stays.

        Args:
            earlier: a projection of the same run as it was before the step that the trainer goes back to.
            notice: what is to be said of it.
        """
        without_labels = self._answers.batches_without_labels
        self._answers = earlier._answers
        self._detectors, self._large = earlier._detectors, earlier._large
        earlier._watch.follow(self._watch)
        self._watch = earlier._watch
        self._remembered = earlier._remembered
        self._answers.batches_without_labels = without_labels
        self._changed.forget()
        draft = _Draft(unix_time=self._unix_time, attempt=self._attempt, step=-1)
        if notice is not None:
            self._tell(notice, draft)
        return draft.finished(())

    def count_late(self, parts: Sequence[Part], attempt: int) -> None:
        """Count the answers of parts that came after the step that a trainer goes back to, and belong before it."""
        count_answers(parts, self._context, attempt, self._answers)

    # ------------------------------------------------------------------------------------------------ steps

    def _open(self) -> tuple[OutboxEntry, ...]:
        if self._is_open:
            return ()
        self._is_open = True
        return (run_entry(self._context, self._hello),)

    def _begin(self, step: AssembledStep) -> None:
        """Tell who keeps something over steps of a new attempt; ``go_back`` came before, where it had to."""
        if step.attempt <= self._attempt or step.reason == "tail":
            return
        self._attempt = step.attempt
        for detector in self._detectors:
            detector.begin(step.attempt, step.step)
        self._watch.begin(step.attempt, step.step)
        self._answers.begin(step.attempt, step.step)

    def _tell(self, notice: Notice, draft: _Draft) -> None:
        if self._board.is_new(notice):
            draft.show(notice)

    def _tell_setup(self, draft: _Draft) -> None:
        """Say, once, what of the attempt's own tables and settings cannot be used."""
        problem = str(getattr(self._context.text, "problem", ""))
        if problem:
            self._tell(notice_once("tokenizer_unusable", problem, draft.step), draft)
        for number, unusable in enumerate(self._threshold_problems):
            self._tell(notice_once(f"threshold_unusable:{number}", unusable, draft.step), draft)

    def _project_measured(self, step: AssembledStep, draft: _Draft) -> None:
        measured = measure_step(step, self._context, self._settings, self._answers)
        found = measured.found
        seen = self._detect(step, measured)
        own, lost = {**found.values, **telling_facts(step)}, self._accounts.losses()
        companions: dict[str, Value] = {}
        # At most steps nothing is due and nothing is logged: then no row is laid out that would not be written.
        if own or measured.generated is not None or Kind.SCALARS in step.parts or changed(lost, self._lost_written):
            companions = {**companion_facts(step), **self._accounts.figures(), **seen.companions}
            self._add_rows(step, draft, own=own, companions=companions, lost=lost)
        missing = missing_ranks(step, self._context)
        if missing is not None:
            self._tell(missing, draft)
        self._remembered.update({key: (step.step, found.values[key]) for key in REMEMBERED if key in found.values})
        self._add_late_rows(step, draft)
        for table in found.tables:
            payload = table_payload(table, attempt=step.attempt, step=step.step, unix_time=self._unix_time)
            draft.tables.append(entry("table", payload))
        for notice in found.notices:
            self._tell(notice, draft)
        for announcement in seen.announcements:
            self._announce(announcement, draft)
        draft.requests += [self._command(request, draft) for request in seen.requests]
        if measured.generated is not None:
            self._show_evaluation({**companions, **found.values}, draft)

    def _add_rows(
        self,
        step: AssembledStep,
        draft: _Draft,
        *,
        own: Mapping[str, Value],
        companions: Mapping[str, Value],
        lost: Mapping[str, Value],
    ) -> None:
        """Write the step's row, if there is anything to be written, and further ones of what the trainer logged.

        Args:
            step: the step.
            draft: takes the rows in.
            own: what was measured: it is worth a row.
            companions: what stands in a row that is written anyway.
            lost: messages that were lost so far: worth a row where they are not those that were written last.
        """
        logged = scalar_rows(step.parts.get(Kind.SCALARS, ()), {**own, **companions, **lost})
        own = dict(own)
        if logged.num_nonfinite:
            own["sidecar/nonfinite_scalars"] = logged.num_nonfinite
        if logged.num_left_out:
            own["sidecar/scalars_left_out"] = logged.num_left_out
        first, *further = logged.rows
        if own or first or changed(lost, self._lost_written):
            draft.add_row({**rank_facts(step, self._context), **companions, **lost, **first, **own})
            self._lost_written = dict(lost)
        for row in further:
            draft.add_row(row)

    def _detect(self, step: AssembledStep, measured: StepMetrics) -> WatchVerdict:
        """Let the user's rules judge, then everything else; what they find joins what was measured."""
        if step.attempt < self._attempt:
            return WatchVerdict()  # what is left of an attempt that another one has followed
        found, findings = measured.found, list[Finding]()
        for detector in self._detectors:
            verdict = detector.observe(
                Observation(
                    attempt=step.attempt,
                    step=step.step,
                    context=self._context,
                    settings=self._settings,
                    values=found.values,
                    generated=measured.generated,
                    stage=step.stage,
                )
            )
            found.values.update(verdict.values)
            findings.extend(verdict.findings)
        seen = self._watch.observe(
            step, self._context, generated=measured.generated, verdict=found.values, findings=findings
        )
        found.values.update(seen.values)
        found.tables.extend(seen.tables)
        found.notices.extend(seen.notices)
        return seen

    def _add_late_rows(self, step: AssembledStep, draft: _Draft) -> None:
        """What the trainer logged is shown however late it came: in a row of its own, under its own step."""
        late = [part for part in step.late_parts if part.message.kind is Kind.SCALARS]
        for part in late:
            for row in scalar_rows([part], {}).rows:
                if row:
                    draft.add_row(row, step=getattr(part.message, "step", step.step))

    def _announce(self, told: Announcement, draft: _Draft) -> None:
        if told.is_alert:
            alert: dict[str, Json] = {
                "id": f"{self._context.run_id}-{draft.attempt}-{draft.step}-{told.code}",
                "title": told.title,
                "text": f"{told.line} (step {draft.step})\n" + "\n".join(told.block),
                "level": told.level,
                "step": draft.step,
            }
            draft.alerts.append(entry("alert", alert))
        # The line stands alone, exactly as it is promised; what is known of it follows.
        draft.show(Notice(text=told.line, code=told.code, level=told.level, step=draft.step))
        if told.block:
            block = Notice(text="\n".join(told.block), code=f"{told.code}:why", level="info", step=draft.step)
            draft.show(block)

    def _command(self, request: Request, draft: _Draft) -> Command:
        return Command(
            action=request.action,
            command_id=f"{draft.attempt}-{draft.step}-{request.action}",
            reason=request.reason,
        )

    def _show_evaluation(self, values: Mapping[str, Value], draft: _Draft) -> None:
        length = generation_line(draft.step, values)
        lines = [*([length] if length else []), key_metrics_line(draft.step, values, self._remembered)]
        for text in lines:
            draft.show(Notice(text=text, code="evaluation", level="info", step=draft.step))
