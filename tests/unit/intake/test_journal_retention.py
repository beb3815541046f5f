"""Which segments go when the journal is over its budget, what stays known of them, and what stays for good."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.messages import Notice
from sidestep.worker.intake.decisions import Closure, Ending, Incarnation
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.retention import folder_bytes, segment_bytes_within
from sidestep.worker.intake.segment_file import segment_path
from sidestep.worker.intake.segments import Row
from sidestep.worker.outbox import entry
from sidestep.worker.records import StepClosing

BUDGET = 700_000
SEGMENT = 1 << 16


class Written:
    """A journal into which runs write messages of 8 KB, each of which is a step."""

    def __init__(self, folder: Path, max_bytes: int = BUDGET) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.sequences: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.folder, segment_bytes=SEGMENT, max_bytes=self.max_bytes)

    def restart(self) -> None:
        self.journal.close()
        self.open()

    def hello(self, run_id: str, incarnation: str) -> None:
        made = Incarnation(
            incarnation=incarnation, run_id=run_id, attempt=-1, first_seen=1.0, world_size=1, start_step=0
        )
        self.journal.index.add_hello(made, 0, 1.0, b"hello")

    def row(self, incarnation: str, sequence: int, arrival: int) -> Row:
        envelope = Envelope(run_id="-", incarnation=incarnation, rank=0, sequence=sequence)
        return Row(incarnation, 0, sequence, 13, -1, 1, 0, 1.5, arrival, encode(envelope, Notice(text="y" * 8_000)))

    def arrive(self, incarnation: str, count: int = 1) -> None:
        for _ in range(count):
            sequence = self.sequences[incarnation] = self.sequences.get(incarnation, 0) + 1
            self.journal.segments.append([self.row(incarnation, sequence, self.journal.segments.next_arrival)])

    def close_step(self, run_id: str, incarnation: str, sequence: int, attempt: int = 0) -> None:
        """Close the step that used this message, and say that all before the next arrival is accounted for."""
        (found,) = self.journal.segments.select(incarnation, [(0, sequence)]).values()
        step = self.steps[run_id] = self.steps.get(run_id, -1) + 1
        closing = StepClosing(
            run_id=run_id,
            attempt=attempt,
            step=step,
            reason="complete",
            incarnation=incarnation,
            parts=((0, sequence),),
        )
        entries = (*((entry("run", {}),) if step == 0 else ()), entry("row", {"train/step": step}))
        closure = Closure(
            closing=closing, entries=entries, pending_arrival=found.arrival + 1, last_arrival=found.arrival
        )
        self.journal.index.write(run_id, [closure], b"state")

    def end(self, run_id: str, attempt: int) -> None:
        ending = Ending(
            run_id=run_id, attempt=attempt, exit_code=0, reason="", tail_unknown=False, unix_time=1.0, newest_step=0
        )
        self.journal.index.write(run_id, [Closure(closing=ending, pending_arrival=self.journal.segments.next_arrival)])

    @property
    def numbers(self) -> list[int]:
        return [int(path.stem.removeprefix("segment-")) for path in sorted(self.folder.glob("segment-*.sqlite"))]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    made = Written(tmp_path)
    made.hello("run", "inc")
    return made


def test_nothing_goes_within_the_budget(written: Written) -> None:
    written.arrive("inc", 20)
    assert written.journal.tidy() == []
    assert written.numbers[0] == 1
    assert written.journal.statistics()["segments_deleted"] == 0
    written.journal.close()


def test_the_oldest_go_when_their_steps_have_closed_and_what_they_held_stays_known(
    written: Written, caplog: pytest.LogCaptureFixture
) -> None:
    written.arrive("inc", 150)
    for sequence in range(1, 150):
        written.close_step("run", "inc", sequence)
    assert folder_bytes(written.folder) > BUDGET
    written.journal.tidy()
    assert folder_bytes(written.folder) <= BUDGET
    assert written.numbers[0] > 1
    deleted = written.numbers[0] - 1
    assert not list(written.folder.glob("segment-000001*"))
    statistics = written.journal.statistics()
    assert statistics["segments_deleted"] == deleted
    assert f"segment {deleted} with" in caplog.text
    for _ in range(2):  # as it is, and after opening again
        segments = written.journal.segments
        assert segments.committed("inc", 0).ranges().tolist() == [[1, 150]]
        assert segments.holds("inc", 0, 1)
        assert segments.select("inc", [(0, 1)]) == {}
        assert segments.next_arrival == 150
        assert segments.since(0, 1)[0].sequence == statistics["messages_deleted"] + 1
        assert "raw messages are not kept" in written.journal.missing_messages("run")
        assert len(written.journal.index.outbox("run")) == 150
        assert len(written.journal.index.closings("run")) == 149
        written.restart()
    written.journal.close()


def test_a_segment_with_an_open_step_stays_and_so_do_all_after_it(
    written: Written, caplog: pytest.LogCaptureFixture
) -> None:
    written.arrive("inc", 150)
    for sequence in range(1, 4):
        written.close_step("run", "inc", sequence)
    for _ in range(3):
        written.journal.tidy()
    assert written.numbers[0] == 1
    assert caplog.text.count("no segment may go: segment 1, the oldest, has messages of steps that have not") == 1
    for sequence in range(4, 150):
        written.close_step("run", "inc", sequence)
    written.journal.tidy()
    assert written.numbers[0] > 1
    written.journal.close()


def test_one_run_that_waits_keeps_what_it_has_in_a_segment_of_many(written: Written) -> None:
    written.hello("waits", "slow")
    written.arrive("slow", 1)
    written.arrive("inc", 150)
    for sequence in range(1, 151):
        written.close_step("run", "inc", sequence)
    written.journal.tidy()
    assert written.numbers[0] == 1
    written.close_step("waits", "slow", 1)
    written.journal.tidy()
    assert written.numbers[0] > 1
    written.journal.close()


def test_what_an_older_attempt_sent_after_its_end_keeps_nothing(written: Written) -> None:
    written.arrive("inc", 1)
    written.close_step("run", "inc", 1)
    written.end("run", 0)
    written.arrive("inc", 1)  # too late: the run leaves it out
    written.hello("run", "again")
    written.arrive("again", 150)
    for sequence in range(1, 150):
        written.close_step("run", "again", sequence, attempt=1)
    written.journal.tidy()
    assert written.numbers[0] > 1
    written.journal.close()


def test_a_message_that_came_after_the_end_of_the_newest_attempt_is_waited_for(written: Written) -> None:
    written.arrive("inc", 1)
    written.close_step("run", "inc", 1)
    written.end("run", 0)
    written.arrive("inc", 1)  # it was given up too early: the worker takes it up again
    written.hello("other", "o")
    written.arrive("o", 150)
    for sequence in range(1, 151):
        written.close_step("other", "o", sequence)
    written.journal.tidy()
    assert written.numbers[0] == 1
    written.journal.close()


def test_an_index_over_the_budget_is_told_once_and_costs_all_that_may_go(
    written: Written, caplog: pytest.LogCaptureFixture
) -> None:
    written.arrive("inc", 30)
    for sequence in range(1, 31):
        written.close_step("run", "inc", sequence)
    written.journal.index.add_blob("digest", b"t" * (2 * BUDGET), 0.0)
    for _ in range(3):
        written.journal.tidy()
    assert len(written.numbers) == 1
    assert caplog.text.count("and no segment may go: what else is in it is kept in any case: the index") == 1
    written.arrive("inc", 1)
    assert written.journal.segments.holds("inc", 0, 31)
    written.journal.close()


def test_a_kill_between_the_record_and_the_deletion_is_made_good(written: Written) -> None:
    written.arrive("inc", 150)
    for sequence in range(1, 151):
        written.close_step("run", "inc", sequence)
    content = segment_path(written.folder, 1).read_bytes()
    written.journal.tidy()
    written.journal.close()
    segment_path(written.folder, 1).write_bytes(content)
    written.open()
    assert not segment_path(written.folder, 1).exists()
    written.journal.close()


def test_no_budget_keeps_everything(tmp_path: Path) -> None:
    written = Written(tmp_path, max_bytes=0)
    written.hello("run", "inc")
    written.arrive("inc", 60)
    for sequence in range(1, 61):
        written.close_step("run", "inc", sequence)
    written.journal.tidy()
    assert written.numbers[0] == 1
    assert written.journal.missing_messages("run") == ""
    written.journal.close()


@pytest.mark.parametrize(
    ("segment_bytes", "max_bytes", "expected"),
    [
        (1 << 30, 20 << 30, 1 << 30),
        (1 << 30, 0, 1 << 30),
        (1 << 30, 1 << 30, 1 << 27),
        (1 << 20, 1, 1 << 16),
    ],
)
def test_a_small_budget_makes_small_segments(segment_bytes: int, max_bytes: int, expected: int) -> None:
    assert segment_bytes_within(segment_bytes, max_bytes) == expected
