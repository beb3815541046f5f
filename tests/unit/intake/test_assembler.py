from __future__ import annotations

import pytest
from tests.support.wire_trainer import step_messages

from sidestep.protocol.frames import Envelope, UnknownMessage
from sidestep.protocol.messages import Goodbye, Kind, Message, Notice, StepEnd
from sidestep.protocol.ranges import RangeSet
from sidestep.worker.errors import JournalError
from sidestep.worker.intake.assembler import Assembler, ClosedStep
from sidestep.worker.intake.assembly import Journaled, assemble
from sidestep.worker.intake.decisions import Incarnation
from sidestep.worker.records import RankAccount

DEADLINE_SECONDS = 30.0


class Stream:
    """Gives messages of ranks their numbers, and hands them to an assembler in the order a test wants."""

    def __init__(self, world_size: int = 1, last_closed: int = -1) -> None:
        incarnation = Incarnation(
            incarnation="inc", run_id="run", attempt=0, first_seen=0.0, world_size=world_size, start_step=0
        )
        self.assembler = Assembler(incarnation, deadline_seconds=DEADLINE_SECONDS, last_closed=last_closed)
        self.arrival = 0
        self.sequences: dict[int, int] = {}

    def make(self, message: Message | UnknownMessage, rank: int = 0) -> Journaled:
        self.sequences[rank] = self.sequences.get(rank, 0) + 1
        accounts = {"losses": (self.sequences[rank], 1, 0)}
        envelope = Envelope(
            run_id="run", incarnation="inc", rank=rank, sequence=self.sequences[rank], accounts=accounts
        )
        return Journaled(envelope=envelope, message=message)

    def make_step(self, step: int, rank: int = 0) -> list[Journaled]:
        return [self.make(message, rank) for message in step_messages(step)]

    def add(self, *messages: Journaled, now: float = 0.0) -> None:
        for each in messages:
            arrived = Journaled(
                envelope=each.envelope, message=each.message, arrival=self.arrival, received_at=1_700_000_100.0 + now
            )
            self.assembler.add(arrived, now)
            self.arrival += 1

    def close(self, now: float = 0.0, *, ended: bool = False) -> list[ClosedStep]:
        return self.assembler.close_ready(now, ended=ended)


def steps(closed: list[ClosedStep]) -> list[tuple[int, str]]:
    return [(each.closing.step, each.closing.reason) for each in closed]


def test_a_step_closes_when_its_end_and_all_announced_parts_are_here() -> None:
    stream = Stream()
    *parts, end = stream.make_step(0)
    stream.add(*parts)
    assert stream.close() == []
    stream.add(end)
    (closed,) = stream.close()
    assert steps([closed]) == [(0, "complete")]
    assert set(closed.step.parts) == {Kind.LEARNING_RATES, Kind.LOSSES, Kind.ANSWERS}
    assert closed.step.unix_time == 1_700_000_000.0
    assert closed.step.lag_seconds == 100.0
    assert closed.step.accounts == {0: RankAccount(kinds={"losses": (4, 1, 0)})}
    assert (closed.step.ranks_expected, closed.step.ranks_seen) == (1, 1)


def test_an_announced_part_that_is_missing_is_waited_for() -> None:
    stream = Stream()
    messages = stream.make_step(0)
    stream.add(*messages[1:])
    assert stream.close(DEADLINE_SECONDS - 0.1) == []
    stream.add(messages[0], now=DEADLINE_SECONDS - 0.1)
    assert steps(stream.close(DEADLINE_SECONDS - 0.1)) == [(0, "complete")]


def test_the_deadline_counts_from_the_first_part() -> None:
    stream = Stream(world_size=2)
    stream.add(*stream.make_step(0, rank=1), now=5.0)
    assert stream.close(5.0 + DEADLINE_SECONDS - 0.01) == []
    (closed,) = stream.close(5.0 + DEADLINE_SECONDS)
    assert steps([closed]) == [(0, "deadline")]
    assert (closed.step.ranks_expected, closed.step.ranks_seen) == (2, 1)


def test_steps_close_in_order_though_the_later_is_complete_first() -> None:
    stream = Stream(world_size=2)
    first, second = [stream.make_step(0, rank) for rank in (0, 1)], [stream.make_step(1, rank) for rank in (0, 1)]
    stream.add(*first[0], *second[0], *second[1])
    assert stream.close() == []
    stream.add(*first[1])
    assert steps(stream.close()) == [(0, "complete"), (1, "complete")]


def test_a_hole_in_a_stream_is_waited_for_since_it_may_be_an_earlier_step() -> None:
    """A killed worker gets the newer messages first, and the lost ones when they are sent again."""
    stream = Stream()
    lost, newer = stream.make_step(0), stream.make_step(1)
    stream.add(*newer)
    assert stream.close() == []
    stream.add(*lost)
    assert steps(stream.close()) == [(0, "complete"), (1, "complete")]


def test_a_hole_is_given_up_with_the_step_that_waited_for_it() -> None:
    stream = Stream()
    stream.make_step(0)
    stream.add(*stream.make_step(1), now=0.0)
    stream.add(*stream.make_step(2), now=29.0)
    assert steps(stream.close(30.0)) == [(1, "deadline"), (2, "complete")]


@pytest.mark.parametrize("what", ["refused", "unknown"])
def test_a_number_that_brings_nothing_is_no_hole(what: str) -> None:
    stream = Stream()
    nothing = stream.make(UnknownMessage(kind=29))
    if what == "refused":
        stream.assembler.pass_over(*nothing.key)
    else:
        stream.add(nothing)
    stream.add(*stream.make_step(0))
    (closed,) = stream.close()
    assert steps([closed]) == [(0, "complete")]
    assert nothing.key not in closed.closing.parts


def test_the_newest_end_of_a_rank_wins() -> None:
    stream = Stream()
    part, *_ = step_messages(0)
    stream.add(stream.make(part), stream.make(StepEnd(step=0, unix_time=1.0, sent={"learning_rates": 2})))
    assert stream.close() == []
    corrected = StepEnd(step=0, unix_time=1.0, sent={"learning_rates": 1}, dropped={"learning_rates": 1})
    stream.add(stream.make(corrected))
    (closed,) = stream.close()
    assert closed.step.ends == {0: corrected}


def test_an_older_end_that_comes_late_does_not_win() -> None:
    stream = Stream()
    older = stream.make(StepEnd(step=0, unix_time=1.0, sent={"losses": 9}))
    newer = stream.make(StepEnd(step=0, unix_time=1.0))
    stream.add(newer, older)
    (closed,) = stream.close()
    assert closed.step.ends == {0: newer.message}


def test_late_parts_are_counted_and_go_into_the_next_closing() -> None:
    stream = Stream(world_size=2)
    late = stream.make_step(0, rank=1)
    stream.add(*stream.make_step(0), now=0.0)
    assert steps(stream.close(DEADLINE_SECONDS)) == [(0, "deadline")]
    stream.add(*late, now=31.0)
    stream.add(*stream.make_step(1), *stream.make_step(1, rank=1), now=31.0)
    (closed,) = stream.close(31.0)
    assert [part.message.kind for part in closed.step.late_parts] == [Kind.LEARNING_RATES, Kind.LOSSES, Kind.ANSWERS]
    assert {part.rank for part in closed.step.late_parts} == {1}
    assert closed.closing.late_parts == ((1, 1), (1, 2), (1, 3))
    assert stream.assembler.late_parts == 3


def test_all_goodbyes_end_the_incarnation_and_close_what_is_open() -> None:
    stream = Stream(world_size=2)
    stream.add(*stream.make_step(0), stream.make(Goodbye(newest_step=0)))
    assert not stream.assembler.has_ended(0.0)
    stream.add(stream.make(Goodbye(newest_step=-1), rank=1))
    assert stream.assembler.has_ended(0.0)
    ended, tail = stream.close(ended=True)
    assert steps([ended, tail]) == [(0, "ended"), (0, "tail")]
    assert tail.closing.parts == ((0, 5), (1, 1)), "rank 1's goodbye is all that tells of its loss"
    assert tail.step.accounts[1].kinds == {"losses": (1, 1, 0)}
    assert tail.step.num_messages == 0
    assert not stream.assembler.has_leftovers()


def test_a_goodbye_without_news_is_in_no_closing() -> None:
    stream = Stream()
    stream.add(*stream.make_step(0), stream.make(Goodbye(newest_step=0)))
    (closed,) = stream.close(ended=True)
    assert steps([closed]) == [(0, "complete")]
    assert not stream.assembler.has_leftovers()


def test_a_goodbye_that_overtook_lost_messages_waits_for_them() -> None:
    stream = Stream()
    lost = stream.make_step(0)
    stream.add(stream.make(Goodbye(newest_step=0)), now=1.0)
    assert not stream.assembler.has_ended(1.0)
    assert stream.assembler.has_ended(1.0 + DEADLINE_SECONDS)
    stream.add(*lost, now=2.0)
    assert stream.assembler.has_ended(2.0)


def test_what_comes_after_the_last_step_is_closed_as_a_tail() -> None:
    stream = Stream()
    stream.add(*stream.make_step(0))
    assert steps(stream.close()) == [(0, "complete")]
    scalars = stream.make(step_messages(0)[0])
    stream.add(scalars, stream.make(Notice(text="so long")), stream.make(Goodbye()))
    assert stream.close() == []
    (closed,) = stream.close(ended=True)
    assert steps([closed]) == [(0, "tail")]
    assert [notice.text for notice in closed.step.notices] == ["so long"]
    assert [part.sequence for part in closed.step.late_parts] == [scalars.envelope.sequence]
    assert closed.step.ends == {}
    assert closed.step.unix_time == 1_700_000_100.0


def test_a_trainer_that_speaks_again_after_a_tail_loses_no_step() -> None:
    stream = Stream()
    stream.add(*stream.make_step(0), stream.make(Notice(text="one")))
    stream.close()
    for text in ("two", "three"):
        stream.add(stream.make(Notice(text=text)))
        assert steps(stream.close(ended=True)) == [(0, "tail")]
    stream.add(*stream.make_step(1))
    assert steps(stream.close()) == [(1, "complete")]


def test_a_run_may_begin_at_any_step() -> None:
    stream = Stream()
    stream.add(*stream.make_step(1_000))
    assert steps(stream.close()) == [(1_000, "complete")]


def test_a_batch_says_what_is_accounted_for_once() -> None:
    stream = Stream()
    stream.add(*stream.make_step(0), *stream.make_step(1), stream.make_step(2)[0])
    first, second = stream.close()
    assert (first.pending_arrival, second.pending_arrival) == (0, 8)
    assert (first.last_arrival, second.last_arrival) == (3, 7)


def test_a_restarted_assembler_goes_on_where_the_journal_stands() -> None:
    stream = Stream(last_closed=4)
    stream.sequences[0] = 20
    stream.assembler.restore_stream(0, RangeSet(range(1, 21)), 20)
    stream.add(*stream.make_step(5))
    assert steps(stream.close()) == [(5, "complete")]


def test_at_most_so_many_close_at_once() -> None:
    stream = Stream()
    for step in range(5):
        stream.add(*stream.make_step(step))
    assert steps(stream.assembler.close_ready(0.0, limit=3)) == [(step, "complete") for step in range(3)]
    assert steps(stream.assembler.close_ready(0.0, limit=3)) == [(step, "complete") for step in (3, 4)]


def test_a_closing_and_its_messages_make_the_same_step_again_in_any_order() -> None:
    stream = Stream(world_size=2)
    messages = [*stream.make_step(0), *stream.make_step(0, rank=1)]
    stream.add(*reversed(messages))
    (closed,) = stream.close()
    kept = {
        each.key: Journaled(envelope=each.envelope, message=each.message, arrival=at, received_at=1_700_000_100.0)
        for at, each in enumerate(messages)
    }
    again = assemble(closed.closing, kept)
    assert again.parts.keys() == closed.step.parts.keys()
    assert [part.sequence for part in again.parts[Kind.LOSSES]] == [2, 2]
    assert [part.rank for part in again.parts[Kind.LOSSES]] == [0, 1]
    assert (again.unix_time, again.lag_seconds, again.accounts) == (
        closed.step.unix_time,
        closed.step.lag_seconds,
        closed.step.accounts,
    )


def test_messages_of_an_older_wire_are_not_counted() -> None:
    stream = Stream()
    messages = stream.make_step(0)
    stream.add(*messages)
    (closed,) = stream.close()
    assert closed.step.num_messages == len(messages)
    of_before = {each.key: each._replace(wire_minor=0) for each in messages}
    assert assemble(closed.closing, of_before).num_messages is None


def test_a_closing_whose_messages_are_gone_is_told() -> None:
    stream = Stream()
    stream.add(*stream.make_step(0))
    (closed,) = stream.close()
    with pytest.raises(JournalError, match="step 0 of run run used messages that are gone"):
        assemble(closed.closing, {})
