"""Runs a journal's raw messages through the worker's own pipeline once more, and makes a NEW run of each.

Recorded closings are not looked at, only the messages, the Hellos and when they came: steps are joined again on the
clock of their arrivals, and judged by other settings where some are given. Where no closing depended on the clock (all
parts came before the deadline) and no setting is changed, the new run has the values of the old one. The old run, its
outbox and its journal are only read (docs/delivery.md, section 3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Final

from sidestep.protocol.frames import Envelope, decode, encode
from sidestep.protocol.messages import Goodbye, Hello, StepEnd
from sidestep.worker.errors import JournalError
from sidestep.worker.intake.assembly import Journaled, journaled
from sidestep.worker.intake.decisions import Ending, Incarnation
from sidestep.worker.intake.journal import Journal
from sidestep.worker.outbox import canonical
from sidestep.worker.own_detectors import recorded, remember
from sidestep.worker.pipeline import RunPipeline
from sidestep.worker.records import StepClosing
from sidestep.worker.rejudging import DETECTORS
from sidestep.worker.replay import ROWS_FILE, entries_of, write_rows

TAG: Final = "recomputed"
_TAG_PREFIX: Final = "recomputed-from:"
_READ_ROWS: Final = 500
_STEPS_AT_ONCE: Final = 32
"""Ended steps that wait for one transaction."""
_LONGEST_TURN_SECONDS: Final = 0.5
"""Of the arrivals' clock, between two looks at what can be closed."""
_MAX_TAG_CHARACTERS: Final = 64
"""W&B takes no longer one."""
_MAX_ID_CHARACTERS: Final = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """A new run, and how its steps stand to those of the old one."""

    run_id: str
    of: str
    """The run whose messages it is made of."""
    entries: int
    rows: int
    """Rows and tables among them."""
    steps: int
    """Closings of steps."""
    closed_otherwise: int
    """Steps that closed for another reason or with other late parts than recorded, or in one of both runs alone."""
    is_ended: bool
    """Whether the run's newest attempt has ended."""


def recompute(
    journal: Path,
    out: Path,
    changes: Mapping[str, Any],
    tell: Callable[[Recomputed], None],
    *,
    deadline_seconds: float,
) -> tuple[Path, list[Recomputed]]:
    """Make a new run of every run of ``journal`` in a fresh journal in ``out``; return its folder and the runs.

    Raises:
        JournalError: the journal cannot be read, raw messages of a run are not kept any more, or ``out`` holds another.
    """
    folder = out / "journal"
    if folder.exists():
        raise JournalError(f"{folder} is there already; name another --out")
    source = Journal(journal, read_only=True)
    made: list[Recomputed] = []
    try:
        runs = source.index.runs()
        for run_id in runs:
            if missing := source.missing_messages(run_id):
                raise JournalError(
                    f"run {run_id} cannot be recomputed: {missing}. A recompute needs every raw message of a run "
                    "(a larger --journal-max-bytes keeps them for longer); `sidestep replay` without --recompute "
                    "brings over what is recorded"
                )
        target = Journal(folder, on_network_fs=True)  # what is lost of it can be made again
        try:
            for run_id in runs:
                made.append(_RunAgain(source, run_id, target, changes, deadline_seconds).run())
                tell(made[-1])
            write_rows(target.index, [each.run_id for each in made], out / ROWS_FILE)
        finally:
            target.close()
    finally:
        source.close()
    return folder, made


def new_run_id(run_id: str, changes: Mapping[str, Any]) -> str:
    """Return the id of the run that ``run_id`` becomes under ``changes``: the same each time."""
    made = f"{run_id}-{TAG}"
    if changes:
        made += f"-{hashlib.sha256(canonical(changes)).hexdigest()[:8]}"
    if len(made) > _MAX_ID_CHARACTERS:
        made = f"{TAG}-{hashlib.sha256(made.encode()).hexdigest()[:16]}"
    return made


class _RunAgain:
    """One run, from its Hellos and messages in the order they came."""

    def __init__(
        self, source: Journal, run_id: str, target: Journal, changes: Mapping[str, Any], deadline_seconds: float
    ) -> None:
        self._source, self._target = source, target
        self._of, self._run_id = run_id, new_run_id(run_id, changes)
        self._changes = changes
        self._now = 0.0
        self._advanced_at = 0.0
        self._num_ended = 0
        self._lost: dict[str, str] = {}
        self._incarnations = source.index.incarnations(run_id)
        self._endings = {each.attempt: each for each in source.index.endings(run_id)}
        for digest in sorted(source.index.blob_digests() - target.index.blob_digests()):
            target.index.add_blob(digest, source.index.blob(digest) or b"", 0.0)
        remember(target.index, recorded(source.index))
        self._hellos = sorted(self._read_hellos(), key=itemgetter(0))
        self._greet_next()
        self._pipeline = RunPipeline(
            target,
            self._run_id,
            deadline_seconds=deadline_seconds,
            clock=lambda: self._now,
            messages_of=source.messages_of,
        )

    def _read_hellos(self) -> Iterator[tuple[float, Incarnation, int, bytes]]:
        for incarnation in self._incarnations:
            for rank, (received_at, body) in self._source.index.hello_arrivals(incarnation.incarnation).items():
                envelope, hello = decode(body)
                if isinstance(hello, Hello):
                    yield received_at, incarnation, rank, self._rewritten(envelope, hello)

    def _rewritten(self, envelope: Envelope, hello: Hello) -> bytes:
        tag = f"{_TAG_PREFIX}{self._of}"[:_MAX_TAG_CHARACTERS]
        hello = replace(
            hello,
            settings=_changed(hello.settings, self._changes),
            tags=(*hello.tags, TAG, tag),
            name=f"{hello.name or self._of} ({TAG})",
        )
        return encode(envelope._replace(run_id=self._run_id), hello)

    # ------------------------------------------------------------------------------------------------ the run

    def run(self) -> Recomputed:
        for each in self._messages():
            while self._hellos and self._hellos[0][0] <= each.received_at:
                self._advance(self._hellos[0][0])
                self._greet_next()
                self._pipeline.refresh()
            if each.received_at - self._advanced_at >= _LONGEST_TURN_SECONDS:
                self._advance(each.received_at)
            self._now = max(self._now, each.received_at)
            self._pipeline.add(each, self._now)
            self._num_ended += isinstance(each.message, StepEnd)
            if self._num_ended >= _STEPS_AT_ONCE or isinstance(each.message, Goodbye):
                self._advance(each.received_at)
        self._end()
        return self._result()

    def _messages(self) -> Iterator[Journaled]:
        names = {each.incarnation for each in self._incarnations}
        for incarnation in self._incarnations:  # a number that was refused never came and never will
            for rank in range(incarnation.world_size):
                ranges = self._source.segments.committed(incarnation.incarnation, rank).ranges().tolist()
                for (_, last), (first, _) in zip([[0, 0], *ranges], ranges, strict=False):
                    for sequence in range(last + 1, first):
                        self._pipeline.refuse(incarnation.incarnation, rank, sequence)
        arrival = 0
        while rows := self._source.segments.since(arrival, _READ_ROWS):
            yield from (journaled(row) for row in rows if row.incarnation in names)
            arrival = max(map(attrgetter("arrival"), rows)) + 1

    def _greet_next(self) -> None:
        """The next Hello is said; what was lost of the attempts before it is lost from then on."""
        received_at, incarnation, rank, body = self._hellos.pop(0)
        self._now = max(self._now, received_at)
        made = replace(incarnation, run_id=self._run_id)
        self._target.index.add_hello(made, rank, received_at, body)
        self._lose([each for each in self._incarnations if each.attempt < incarnation.attempt])

    def _lose(self, incarnations: list[Incarnation]) -> None:
        for each in incarnations:
            ending = self._endings.get(each.attempt)
            if ending is not None and ending.tail_unknown:
                self._lost[each.incarnation] = ending.reason

    def _advance(self, now: float) -> None:
        self._now = max(self._now, now)
        self._advanced_at = self._now
        self._num_ended = 0
        while self._pipeline.advance(self._now, self._lost).closings:
            pass

    def _end(self) -> None:
        while self._hellos:
            self._greet_next()
            self._pipeline.refresh()
        self._lose(self._incarnations)
        self._advance(self._now)
        if self._endings:  # what is not whole by now waits for nothing any more
            self._advance(max([self._now, *(each.unix_time for each in self._endings.values())]))

    def _result(self) -> Recomputed:
        index = self._target.index
        before, after = ({self._key(d): (d.reason, d.late_parts) for d in self._steps(*of)} for of in self._both())
        entries = rows = 0
        for each in entries_of(index, self._run_id):
            entries, rows = entries + 1, rows + (each.row_number is not None)
        endings = [each for each in index.closings(self._run_id) if isinstance(each, Ending)]
        return Recomputed(
            run_id=self._run_id,
            of=self._of,
            entries=entries,
            rows=rows,
            steps=len(after),
            closed_otherwise=sum(before.get(key) != after.get(key) for key in before.keys() | after.keys()),
            is_ended=bool(endings) and endings[-1].attempt == self._incarnations[-1].attempt,
        )

    def _both(self) -> tuple[tuple[Journal, str], tuple[Journal, str]]:
        return (self._source, self._of), (self._target, self._run_id)

    @staticmethod
    def _steps(journal: Journal, run_id: str) -> list[StepClosing]:
        closings = journal.index.closings(run_id)
        return [each for each in closings if isinstance(each, StepClosing) and each.reason != "tail"]

    @staticmethod
    def _key(closing: StepClosing) -> tuple[int, int]:
        return closing.attempt, closing.step


def _changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Put changes over a run's settings; of the detectors' rules those that are not named stay."""
    before = settings.get(DETECTORS)
    rules = {**(before if isinstance(before, Mapping) else {}), **changes.get(DETECTORS, {})}
    return {**settings, **changes, **({DETECTORS: rules} if rules else {})}
