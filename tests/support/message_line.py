"""From frames to the outbox without a socket, a process or a clock: a worker's parts, fed and asked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.support.wire_trainer import CONTENTS, make_hello, step_messages

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.messages import Blob, Message
from sidestep.worker.intake.feed import Feed, Refused
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.reception import Reception
from sidestep.worker.pipeline import Outcome, RunPipeline
from sidestep.worker.records import StepClosing
from sidestep.worker.replay import Comparison, replay

DEADLINE_SECONDS = 30.0
RUN = "run"


class Line:
    """One journal, one run, and the parts of a worker between them, which can be made anew at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sequence: dict[tuple[str, int], int] = {}
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.folder)
        for connection in (self.journal.index.database.connection, self.journal.segments._open_writer):
            connection.execute("PRAGMA synchronous=OFF")  # no power is lost here
        self.pipelines: dict[str, RunPipeline] = {
            run_id: self._pipeline(run_id) for run_id in self.journal.index.runs()
        }
        starts = [each.recovery_start() for each in self.pipelines.values()]
        known = [start for start in starts if start is not None]
        self.feed = Feed(
            self.journal.segments,
            limit_bytes=1 << 24,
            start_arrival=min(known, default=self.journal.segments.next_arrival),
        )
        self.reception = Reception(
            self.journal,
            self.feed,
            instance="w",
            commit_interval_seconds=0.0,
            commit_messages=1,
            clock=lambda: 1_700_000_001.0,
        )

    def _pipeline(self, run_id: str) -> RunPipeline:
        return RunPipeline(self.journal, run_id, deadline_seconds=DEADLINE_SECONDS)

    def restart(self) -> None:
        """Forget all that is not on disk."""
        self.journal.close()
        self.open()

    def envelope(self, incarnation: str, rank: int, sequence: int) -> Envelope:
        return Envelope(run_id=RUN, incarnation=incarnation, rank=rank, sequence=sequence)

    def number(self, incarnation: str, rank: int = 0) -> int:
        """Return the stream's next sequence number."""
        made = self.sequence[incarnation, rank] = self.sequence.get((incarnation, rank), 0) + 1
        return made

    def bring(self, frame: bytes, incarnation: str, rank: int = 0) -> None:
        """Let a frame arrive and be committed."""
        self.reception.take(f"{incarnation}/{rank}".encode(), frame, 0.0)
        self.reception.commit(0.0)

    def say(self, message: Message, incarnation: str = "inc", *, rank: int = 0, numbered: bool = False) -> None:
        sequence = self.number(incarnation, rank) if numbered else 0
        self.bring(encode(self.envelope(incarnation, rank, sequence), message), incarnation, rank)

    def greet(self, incarnation: str = "inc", *, rank: int = 0, world_size: int = 1, tables: bool = True) -> None:
        self.say(make_hello(world_size=world_size), incarnation, rank=rank)
        if tables:
            self.give_tables(incarnation)

    def give_tables(self, incarnation: str = "inc") -> None:
        for digest, content in CONTENTS.items():
            self.say(Blob(digest=digest, content=content), incarnation)

    def step(self, step: int, incarnation: str = "inc", *, rank: int = 0) -> None:
        for message in step_messages(step):
            self.say(message, incarnation, rank=rank, numbered=True)

    def steps_of(self, steps: Sequence[int], incarnation: str = "inc", now: float = 0.0) -> None:
        """Bring whole steps, and close them."""
        for step in steps:
            self.step(step, incarnation)
            self.advance(now)

    def advance(self, now: float = 0.0, lost: dict[str, str] | None = None) -> Outcome:
        for event in self.feed.take_events():
            pipeline = self.pipelines.setdefault(event.run_id, self._pipeline(event.run_id))
            if isinstance(event, Refused):
                pipeline.refuse(event.incarnation, event.rank, event.sequence)
            else:
                pipeline.refresh()
        while messages := self.feed.take():
            for each in messages:
                self.pipelines[RUN].add(each, now)
        return self.pipelines[RUN].advance(now, lost or {})

    def is_ended(self) -> bool:
        return self.pipelines[RUN].is_ended

    def steps(self) -> list[tuple[int, int]]:
        """Return (attempt, step) of the closed steps, tails not among them, in order."""
        closings = self.journal.index.closings(RUN)
        return [
            (each.attempt, each.step) for each in closings if isinstance(each, StepClosing) and each.reason != "tail"
        ]


def replayed(line: Line, out: Path) -> Comparison:
    """Rebuild the run from the journal alone."""
    _, (made,) = replay(line.folder, out, lambda _made: None)
    return made
