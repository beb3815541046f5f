"""Decisions in, outbox entries out, for one run: the step from the assembler's records to the run's projection.

The live worker and a replay go through here with the same decisions; so the same entries come out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

from sidestep.protocol.messages import Notice
from sidestep.worker.contexts import build_context
from sidestep.worker.intake.decisions import ContextRecord, Ending, Rewind
from sidestep.worker.intake.index import Index
from sidestep.worker.outbox import entry
from sidestep.worker.own_detectors import recorded
from sidestep.worker.projection import Projection, RunProjection
from sidestep.worker.records import AssembledStep
from sidestep.worker.rewinding import EarlierState, MessagesOf, rewind_notice

_LOG: Final = logging.getLogger(__name__)


class RunProjector:
    """One run's projection, with the contexts that its attempts bring."""

    def __init__(self, index: Index, messages_of: MessagesOf) -> None:
        """Read Hellos, tables and snapshots from ``index``, and messages of earlier closings by ``messages_of``."""
        self._index = index
        self._earlier = EarlierState(index, messages_of)
        self._projection: RunProjection | None = None
        self._context: ContextRecord | None = None
        self.failures = 0
        """Steps that could not be projected."""

    def adopt(self, record: ContextRecord) -> None:
        """Go on with what ``record`` stands for."""
        context, hello = build_context(self._index, record)
        self._context = record
        if self._projection is None:
            self._projection = RunProjection(context, hello, own_detectors=recorded(self._index))
        else:
            self._projection.adopt(context, hello)

    def restore(self, pieces: Mapping[str, bytes], state: bytes | None = None) -> None:
        """Go on from what another worker has stored: pieces, or the one body of a journal of schema 1.

        Raises:
            ValueError: the state is of another version.
        """
        if pieces:
            self._current.restore_pieces(pieces)
        elif state is not None:
            self._current.restore(state)

    def rewind(self, decision: Rewind) -> Projection:
        """Know again what was known where ``decision`` goes back to.

        Raises:
            JournalError: a message that is needed is gone or cannot be read.
            ValueError: the snapshot is of another version.
        """
        if self._context is None:
            raise RuntimeError("a run is projected before its context is known")
        earlier = self._earlier.make(decision, self._context)
        return self._current.go_back(earlier, rewind_notice(self._index, decision))

    @property
    def _current(self) -> RunProjection:
        if self._projection is None:
            raise RuntimeError("a run is projected before its context is known")
        return self._projection

    def project(self, step: AssembledStep) -> Projection:
        """Return what one step makes the run say; what cannot be projected makes it say so, and is no one's end."""
        return self._guarded(f"step {step.step}", lambda: self._current.project(step))

    def finish(self, ending: Ending) -> Projection:
        """Return what the end of an attempt makes the run say."""
        made = self._guarded(
            "the end",
            lambda: self._current.finish(
                ending.exit_code,
                ending.reason,
                attempt=ending.attempt,
                unix_time=ending.unix_time,
                newest_step=ending.newest_step,
                tail_unknown=ending.tail_unknown,
            ),
        )
        if made.entries and made.entries[-1].kind == "finish":
            return made
        end = {"exit_code": ending.exit_code, "reason": ending.reason, "attempt": ending.attempt}
        return Projection(entries=(*made.entries, entry("finish", end)), notices=made.notices)

    def _guarded(self, what: str, make: Callable[[], Projection]) -> Projection:
        try:
            return make()
        except Exception as error:  # noqa: BLE001  (a bug in one metric must not end the other steps, nor the worker)
            self.failures += 1
            _LOG.exception("%s could not be projected", what)
            text = f"sidestep could not work out {what}: {type(error).__name__}: {error}"
            notice = Notice(text=text, code="projection_failed")
            value = {"text": notice.text, "level": notice.level, "code": notice.code}
            return Projection(entries=(entry("notice", value),))

    def changed_pieces(self, *, is_snapshot: bool = False) -> dict[str, bytes]:
        """Return what of the state has changed since it was asked for last; nothing before a context is known."""
        return {} if self._projection is None else self._projection.changed_pieces(is_snapshot=is_snapshot)
