from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.message_line import DEADLINE_SECONDS, Line, replayed
from tests.support.wire_trainer import CONTENTS, step_messages

from sidestep.protocol.messages import Goodbye
from sidestep.worker.pipeline import QUIET_SECONDS
from sidestep.worker.records import StepClosing


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path / "journal")
    yield made
    made.journal.close()


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
    connection.execute(f"PRAGMA max_page_count={pages + 40}")  # the first step's state is its largest
    outcomes = [line.advance(0.0)]
    assert outcomes[0].closings
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


def test_an_attempt_that_another_follows_is_waited_for_until_it_is_quiet(line: Line, tmp_path: Path) -> None:
    """What the first trainer had sent may still be on its way when the second one says Hello."""
    line.greet()
    line.step(0)
    line.advance(0.0)
    line.greet("next")
    line.step(1, "next")
    assert line.advance(10.0).closings == 0, "the second attempt waits"
    line.step(1)
    line.advance(11.0)
    assert line.steps() == [(0, 0), (0, 1)]
    assert line.advance(11.0 + QUIET_SECONDS - 0.1).closings == 0
    line.advance(11.0 + QUIET_SECONDS)
    line.advance(11.0 + QUIET_SECONDS)
    assert line.steps() == [(0, 0), (0, 1), (1, 1)]
    (ending,) = line.journal.index.endings("run")
    assert (ending.attempt, ending.tail_unknown) == (0, True)
    assert replayed(line, tmp_path / "out").is_identical


def test_an_attempt_that_is_never_quiet_is_waited_for_until_the_deadline(line: Line) -> None:
    line.greet()
    line.step(0)
    line.advance(0.0)
    line.greet("next")
    line.step(1, "next")
    for second in range(int(DEADLINE_SECONDS) + 1):
        line.step(1 + second)
        line.advance(float(second))
    line.advance(DEADLINE_SECONDS)
    assert (1, 1) in line.steps()


def test_what_comes_of_an_ended_attempt_is_counted_late_and_survives_a_restart(line: Line, tmp_path: Path) -> None:
    line.greet()
    line.step(0)
    line.advance(0.0)
    line.greet("next")
    line.step(1, "next")
    line.advance(0.0)
    line.advance(QUIET_SECONDS)
    line.advance(QUIET_SECONDS)
    line.step(1)
    line.advance(5.0)
    line.step(2, "next")
    line.advance(5.1)
    line.restart()
    line.advance(100.0)
    line.advance(100.0 + QUIET_SECONDS)
    assert line.steps() == [(0, 0), (1, 1), (1, 2)]
    (tail,) = [each for each in line.journal.index.closings("run") if isinstance(each, StepClosing) and each.late_parts]
    assert (tail.attempt, tail.reason, tail.incarnation) == (0, "tail", "inc")
    assert [sequence for _, sequence in tail.late_parts] == [5, 6, 7]
    late = [row["sidecar/late_parts"] for row in rows(line) if "sidecar/late_parts" in row]
    assert late == [3]
    line.steps_of([3], "next", 110.0)
    histogram = rows(line)[-1]["data/answer_length_histogram"]
    assert sum(histogram["counts"]) == 4, "attempt 1 repeats step 1: the late answers of that step do not count"
    assert replayed(line, tmp_path / "out").is_identical


def test_messages_of_a_second_trainer_outlive_a_kill_before_the_first_one_has_ended(line: Line) -> None:
    line.greet()
    line.step(0)
    line.advance(0.0)
    line.greet("next")
    line.step(5, "next")
    line.step(1)
    line.advance(0.0)  # step 1 closes though messages of the other attempt came before it
    assert line.steps() == [(0, 0), (0, 1)]
    line.restart()
    for now in (0.0, QUIET_SECONDS, QUIET_SECONDS):
        line.advance(now)
    assert line.steps() == [(0, 0), (0, 1), (1, 5)]


def rows(line: Line) -> list[dict[str, Any]]:
    return [each.value() for each in line.journal.index.outbox("run", 0, 100_000) if each.kind == "row"]
