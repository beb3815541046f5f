"""A trainer that goes back: from which state its new attempt goes on, how far back that is exact, and what is said."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.message_line import RUN, Line, replayed

from sidestep.protocol.messages import Goodbye, StepEnd
from sidestep.worker import rewinding
from sidestep.worker.intake.decisions import Rewind
from sidestep.worker.intake.state_history import SNAPSHOT_CLOSINGS, SNAPSHOTS_PER_AGE, snapshots


@given(st.integers(0, 1_000_000), st.integers(0, 100_000))
def test_a_snapshot_that_went_is_never_asked_for_again(newest: int, further: int) -> None:
    before, after = snapshots(newest), snapshots(newest + further)
    assert {number for number in after if number <= newest} <= set(before)


@given(st.integers(0, 10_000_000))
def test_snapshots_are_few_and_the_denser_the_nearer(newest: int) -> None:
    kept = snapshots(newest)
    assert kept[0] == 0
    assert len(kept) <= SNAPSHOTS_PER_AGE * max(1, newest.bit_length() - 5)
    for earlier, later in zip(kept, [*kept[1:], newest + 1], strict=True):
        assert later - earlier <= SNAPSHOT_CLOSINGS + (newest - earlier) / (SNAPSHOTS_PER_AGE // 2 - 1)


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path / "journal")
    made.greet()
    yield made
    made.journal.close()


def rows(line: Line, attempt: int) -> dict[int, dict[str, Any]]:
    """Return step to the row of an attempt."""
    found = [each.value() for each in line.journal.index.outbox(RUN, 0, 100_000) if each.kind == "row"]
    return {row["train/step"]: row for row in found if row["train/attempt"] == attempt and "lr/language_model" in row}


def measured(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key.partition("/")[0] not in {"sidecar", "train"}}


def resume(line: Line, incarnation: str, steps: range, before: str = "inc") -> None:
    line.say(Goodbye(), before, numbered=True)
    line.advance()
    line.greet(incarnation)
    line.steps_of(steps, incarnation)


def rewinds(line: Line) -> list[Rewind]:
    return line.journal.index.rewinds(RUN)


def answer_total(row: dict[str, Any]) -> int:
    return sum(row["data/answer_length_histogram"]["counts"])


@pytest.mark.parametrize("back_to", [0, 64, 65, 150])
def test_an_attempt_goes_on_exactly_from_the_step_that_it_goes_back_to(
    line: Line, tmp_path: Path, back_to: int
) -> None:
    line.steps_of(range(180))
    line.restart()
    resume(line, "next", range(back_to, 182))
    (rewind,) = rewinds(line)
    assert (rewind.attempt, rewind.step, rewind.is_exact) == (1, back_to, True)
    assert rewind.source_number - rewind.snapshot_number < SNAPSHOT_CLOSINGS
    first, second = rows(line, 0), rows(line, 1)
    for step in range(back_to, 180):
        assert measured(second[step]) == measured(first[step])
    assert answer_total(second[181]) == 182
    line.restart()
    assert replayed(line, tmp_path / "out").is_identical


def test_a_plain_resume_is_no_way_back(line: Line) -> None:
    line.steps_of(range(5))
    resume(line, "next", range(5, 8))
    assert rewinds(line) == []
    assert answer_total(rows(line, 1)[7]) == 8


def test_ways_back_over_ways_back_follow_the_newest_state_before_each_step(line: Line, tmp_path: Path) -> None:
    line.steps_of(range(100))
    resume(line, "second", range(70, 80))
    resume(line, "third", range(75, 78), "second")
    resume(line, "fourth", range(90, 93), "third")
    resume(line, "fifth", range(20, 22), "fourth")
    assert [answer_total(rows(line, attempt)[step]) for attempt, step in ((1, 79), (2, 77), (3, 92), (4, 21))] == [
        80,
        78,
        93,
        22,
    ]
    assert [each.attempt for each in rewinds(line)] == [1, 2, 3, 4]
    assert replayed(line, tmp_path / "out").is_identical


def test_answers_that_came_late_count_once_on_the_way_back_too(tmp_path: Path) -> None:
    line = Line(tmp_path / "late")
    for rank in (0, 1):
        line.greet(rank=rank, world_size=2)
    for step in range(6):
        line.step(step)
        if step != 2:
            line.step(step, rank=1)
        line.advance(0.0)
        if step == 2:
            line.advance(100.0)
        if step == 4:  # rank 1 brings step 2 when step 5 is next
            line.step(2, rank=1)
    line.advance(0.0)
    for rank in (0, 1):
        line.say(Goodbye(), rank=rank, numbered=True)
    line.advance(0.0)
    line.greet("next")
    line.steps_of([5], "next")
    assert len(rewinds(line)) == 1
    assert answer_total(rows(line, 1)[5]) == 11, "two ranks' steps 0 to 4, the late one once, and one rank's step 5"
    line.journal.close()


def test_too_far_back_goes_on_from_the_snapshot_and_says_what_is_missing(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewinding, "MAX_REDONE_STEPS", 10)
    line.steps_of(range(200))
    resume(line, "next", range(100, 102))
    (rewind,) = rewinds(line)
    assert (rewind.snapshot_number, rewind.is_exact) == (64, False)
    assert answer_total(rows(line, 1)[101]) == 64 + 2, "closing 0 is a context: closing 64 is step 63"
    said = [each.value()["text"] for each in line.journal.index.outbox(RUN, 0, 10_000) if each.kind == "notice"]
    assert [text for text in said if "go on from the state after step 63" in text] == said
    assert len(said) == 1
    monkeypatch.undo()
    assert replayed(line, tmp_path / "out").is_identical, "what was recorded is obeyed"


def test_messages_that_are_gone_leave_the_snapshot(line: Line) -> None:
    line.steps_of(range(100))
    line.journal.close()
    with closing(sqlite3.connect(line.folder / "segment-000001.sqlite")) as connection, connection:
        connection.execute("DELETE FROM message WHERE step = 70")
    line.open()
    resume(line, "next", range(80, 82))
    (rewind,) = rewinds(line)
    assert (rewind.snapshot_number, rewind.is_exact) == (64, False)
    assert answer_total(rows(line, 1)[81]) == 64 + 2


def test_the_history_is_bounded(line: Line) -> None:
    for step in range(700):
        line.say(StepEnd(step=step, unix_time=1.0 + step), numbered=True)
        if step % 50 == 49:
            line.advance()
    while line.advance().closings:
        pass
    (newest,) = line.journal.index._rows("SELECT MAX(closed_number) FROM state_piece")
    assert newest == (700,)
    counted = line.journal.index._rows("SELECT name, COUNT(*) FROM state_piece GROUP BY name")
    limit = len(snapshots(700)) + 1
    assert {name for name, _ in counted} == {"run", "measured", "watch", "detector/user_rules"}
    assert all(count <= limit for _, count in counted)
    assert dict(counted)["run"] == limit
