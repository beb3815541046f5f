from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.wire_trainer import CONTENTS, make_hello, step_messages

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.messages import Blob, Goodbye, Message
from sidestep.worker.intake.feed import Feed
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.reception import Reception
from sidestep.worker.pipeline import Outcome, RunPipeline
from sidestep.worker.replay import Comparison, replay

DEADLINE_SECONDS = 30.0


class Line:
    """From frames to the outbox without a socket, a process or a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sequence: dict[str, int] = {}
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.folder)
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
        self.journal.close()
        self.open()

    def say(self, message: Message, incarnation: str = "inc", *, numbered: bool = False) -> None:
        sequence = 0
        if numbered:
            sequence = self.sequence[incarnation] = self.sequence.get(incarnation, 0) + 1
        envelope = Envelope(run_id="run", incarnation=incarnation, rank=0, sequence=sequence)
        self.reception.take(incarnation.encode(), encode(envelope, message), 0.0)
        self.reception.commit(0.0)

    def greet(self, incarnation: str = "inc", *, tables: bool = True) -> None:
        self.say(make_hello(), incarnation)
        if tables:
            self.give_tables(incarnation)

    def give_tables(self, incarnation: str = "inc") -> None:
        for digest, content in CONTENTS.items():
            self.say(Blob(digest=digest, content=content), incarnation)

    def step(self, step: int, incarnation: str = "inc") -> None:
        for message in step_messages(step):
            self.say(message, incarnation, numbered=True)

    def advance(self, now: float = 0.0, lost: dict[str, str] | None = None) -> Outcome:
        for event in self.feed.take_events():
            self.pipelines.setdefault(event.run_id, self._pipeline(event.run_id)).refresh()
        while messages := self.feed.take():
            for each in messages:
                self.pipelines["run"].add(each, now)
        return self.pipelines["run"].advance(now, lost or {})

    def is_ended(self) -> bool:
        return self.pipelines["run"].is_ended

    def steps(self) -> list[tuple[int, int]]:
        closings = self.journal.index.closings("run")
        return [(each.attempt, each.step) for each in closings if hasattr(each, "step")]


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path / "journal")
    yield made
    made.journal.close()


def replayed(line: Line, out: Path) -> Comparison:
    _, (made,) = replay(line.folder, out, lambda _made: None)
    return made


def test_a_step_waits_for_the_tables_it_is_read_with_but_not_for_ever(line: Line) -> None:
    line.greet(tables=False)
    line.step(0)
    assert line.advance(0.0).closings == 0
    assert line.advance(DEADLINE_SECONDS - 1).closings == 0
    assert line.advance(DEADLINE_SECONDS).closings == 2
    (context,) = line.journal.index.contexts("run")
    assert set(context.missing) == set(CONTENTS)
    line.give_tables()
    line.step(1)
    line.advance(DEADLINE_SECONDS)
    assert [each.missing for each in line.journal.index.contexts("run")] == [context.missing, ()]


def test_a_replay_has_the_tables_that_were_there_at_the_time(line: Line, tmp_path: Path) -> None:
    test_a_step_waits_for_the_tables_it_is_read_with_but_not_for_ever(line)
    assert replayed(line, tmp_path / "out").is_identical


def test_a_restart_between_any_two_steps_writes_the_same_outbox(line: Line, tmp_path: Path) -> None:
    steady = Line(tmp_path / "steady")
    for each in (line, steady):
        each.greet()
        for step in range(6):
            each.step(step)
            each.advance()
            if each is line:
                each.restart()
                each.advance()
    assert line.steps() == steady.steps() == [(0, step) for step in range(6)]
    assert line.journal.index.outbox("run") == steady.journal.index.outbox("run")
    steady.journal.close()


def test_messages_that_were_journaled_and_never_seen_are_read_back(line: Line) -> None:
    line.greet()
    line.step(0)
    line.advance()
    for message in step_messages(1)[:2]:
        line.say(message, numbered=True)
    line.restart()
    for message in step_messages(1)[2:]:
        line.say(message, numbered=True)
    line.advance()
    assert line.steps() == [(0, 0), (0, 1)]


def test_a_lost_trainer_that_speaks_again_goes_on_in_its_attempt(line: Line, tmp_path: Path) -> None:
    line.greet()
    line.step(0)
    line.advance()
    line.advance(60.0, {"inc": "silent"})
    assert line.is_ended()
    line.restart()
    line.advance(61.0)
    assert line.is_ended()
    line.step(1)
    line.advance(62.0)
    assert not line.is_ended()
    line.say(Goodbye(newest_step=1), numbered=True)
    line.advance(63.0)
    assert line.steps() == [(0, 0), (0, 1)]
    assert [(each.exit_code, each.tail_unknown) for each in line.journal.index.endings("run")] == [
        (1, True),
        (0, False),
    ]
    assert replayed(line, tmp_path / "out").is_identical


def test_an_ended_run_is_not_ended_again_by_a_restart(line: Line) -> None:
    line.greet()
    line.step(0)
    line.say(Goodbye(newest_step=0), numbered=True)
    line.advance()
    before = line.journal.index.outbox("run")
    for _ in range(2):
        line.restart()
        assert line.pipelines["run"].recovery_start() is None
        line.advance()
    assert line.journal.index.outbox("run") == before


def test_what_cannot_be_written_is_kept_and_written_once(line: Line) -> None:
    line.greet()
    line.step(0)
    connection = line.journal.index._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages}")
    outcomes = [line.advance(0.0)]
    for step in range(1, 400):  # until the index has no page left
        line.step(step)
        outcomes.append(line.advance(0.0))
        if not outcomes[-1].closings:
            break
    assert not outcomes[-1].closings
    assert line.advance(0.5).closings == 0
    connection.execute("PRAGMA max_page_count=1000000")
    assert line.advance(2.0).closings >= 1
    assert line.steps() == [(0, each) for each in range(step + 1)]
    numbers = [each.row_number for each in line.journal.index.outbox("run") if each.row_number is not None]
    assert numbers == list(range(len(numbers)))


def test_tables_are_repeated_as_new_rows_with_the_same_bytes_and_a_replay_does_so_too(
    line: Line, tmp_path: Path
) -> None:
    line.greet()
    line.step(0)
    line.advance()
    before = [each for each in line.journal.index.outbox("run") if each.row_number is not None]
    line.pipelines["run"].repeat((0,))
    (again,) = line.advance().entries
    assert again.payload == before[0].payload
    assert again.row_number == len(before)
    line.step(1)
    line.advance()
    line.restart()
    assert line.steps() == [(0, 0), (0, 1)]
    assert replayed(line, tmp_path / "out").is_identical
