from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.wire_trainer import CONTENTS, GROUPS, TABLES, make_hello, step_messages

from sidestep.protocol.frames import Envelope, encode, split
from sidestep.protocol.messages import (
    Ack,
    Blob,
    Command,
    Heartbeat,
    Message,
    NoAck,
    Notice,
    Refuse,
    Reject,
    Welcome,
)
from sidestep.protocol.tables import digest
from sidestep.protocol.version import WIRE_MAJOR, WIRE_MINOR
from sidestep.worker.intake.feed import Feed, HelloArrived, Refused
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.reception import MAX_GROUPS, RETRY_SECONDS, Reception, Reply

COMMIT_SECONDS = 0.02


class Desk:
    """A reception with its journal, and frames made for it."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder)
        self.feed = Feed(self.journal.segments, limit_bytes=1 << 20, start_arrival=self.journal.segments.next_arrival)
        self.reception = Reception(
            self.journal,
            self.feed,
            instance="worker-1",
            commit_interval_seconds=COMMIT_SECONDS,
            commit_messages=4,
            clock=lambda: 1_700_000_000.0,
        )

    def frame(self, message: Message, sequence: int = 0, *, rank: int = 0, incarnation: str = "inc") -> bytes:
        envelope = Envelope(run_id="run", incarnation=incarnation, rank=rank, sequence=sequence)
        return encode(envelope, message)

    def take(
        self, message: Message, sequence: int = 0, *, peer: bytes = b"p0", rank: int = 0, now: float = 0.0
    ) -> list[Reply]:
        return self.reception.take(peer, self.frame(message, sequence, rank=rank), now)

    def greeted(self, peer: bytes = b"p0", rank: int = 0) -> Welcome:
        ((_, _, welcome),) = self.take(make_hello(world_size=2), peer=peer, rank=rank)
        assert isinstance(welcome, Welcome)
        return welcome


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "journal")
    yield made
    made.journal.close()


def only(replies: list[Reply]) -> Message:
    ((_, _, message),) = replies
    return message


def test_hello_is_stored_before_it_is_answered(desk: Desk) -> None:
    welcome = desk.greeted()
    assert welcome.hello_known
    assert welcome.instance == "worker-1"
    assert set(welcome.wanted) == set(TABLES.values())
    assert list(desk.journal.index.hellos("inc")) == [0]
    assert desk.feed.take_events() == [HelloArrived(run_id="run", incarnation="inc")]


def test_an_unknown_connection_is_welcomed_whatever_it_says(desk: Desk) -> None:
    welcome = only(desk.take(Heartbeat(newest_step=3)))
    assert isinstance(welcome, Welcome)
    assert not welcome.hello_known
    assert desk.take(Heartbeat(newest_step=4)) == []


def test_data_of_an_unknown_incarnation_is_not_taken(desk: Desk) -> None:
    assert isinstance(only(desk.take(Notice(text="early"), 1)), Welcome)
    assert not desk.reception.waits
    assert desk.reception.statistics()["strangers"] == 1


def test_data_on_a_new_connection_of_a_known_incarnation_is_taken(desk: Desk) -> None:
    desk.greeted()
    desk.take(Notice(text="one"), 1)
    desk.reception.commit(1.0)
    ((routing_id, _, welcome),) = desk.take(Notice(text="two"), 2, peer=b"again")
    assert isinstance(welcome, Welcome)
    assert welcome.committed.tolist() == [[1, 1]]
    ((routing_id, _, ack),) = desk.reception.commit(2.0)
    assert isinstance(ack, Ack)
    assert (routing_id, ack.committed.tolist()) == (b"again", [[1, 2]])


def test_nothing_is_acked_before_its_commit(desk: Desk) -> None:
    desk.greeted()
    assert desk.take(Notice(text="one"), 1, now=1.0) == []
    assert not desk.reception.commit_due(1.0 + COMMIT_SECONDS / 2)
    assert desk.reception.commit_due(1.0 + COMMIT_SECONDS)
    ack = only(desk.reception.commit(1.0 + COMMIT_SECONDS))
    assert isinstance(ack, Ack)
    assert ack.committed.tolist() == [[1, 1]]
    assert desk.journal.segments.holds("inc", 0, 1)


def test_a_full_group_is_committed_at_once(desk: Desk) -> None:
    desk.greeted()
    for sequence in range(1, 5):
        assert not desk.reception.commit_due(0.0)
        desk.take(Notice(text="x"), sequence)
    assert desk.reception.commit_due(0.0)
    desk.reception.commit(0.0)
    assert desk.reception.statistics()["commits"] == 1
    assert desk.reception.statistics()["journaled"] == 4


def test_a_group_grows_while_more_waits_to_be_read_but_not_without_end(desk: Desk) -> None:
    desk.greeted()
    for sequence in range(1, 4 * MAX_GROUPS + 1):
        assert not desk.reception.pauses(0.0), "read on: the next frame is here already"
        desk.take(Notice(text="x"), sequence)
    assert desk.reception.pauses(0.0)
    desk.reception.commit(0.0)
    desk.take(Notice(text="x"), 4 * MAX_GROUPS + 1, now=1.0)
    assert desk.reception.commit_due(1.0 + COMMIT_SECONDS)
    assert not desk.reception.pauses(1.0 + COMMIT_SECONDS)
    assert desk.reception.pauses(1.0 + MAX_GROUPS * COMMIT_SECONDS)


def test_duplicates_are_acked_and_journaled_once(desk: Desk) -> None:
    desk.greeted()
    desk.take(Notice(text="x"), 1)
    desk.take(Notice(text="x"), 1)
    desk.reception.commit(0.0)
    desk.take(Notice(text="x"), 1, now=1.0)
    ack = only(desk.reception.commit(1.1))
    assert isinstance(ack, Ack)
    assert ack.committed.tolist() == [[1, 1]]
    assert desk.reception.statistics()["duplicates"] == 2
    assert len(desk.journal.segments.since(0, 10)) == 1
    assert len(desk.feed.take()) == 1


def test_ranks_have_streams_of_their_own(desk: Desk) -> None:
    desk.greeted()
    desk.greeted(b"p1", rank=1)
    desk.take(Notice(text="x"), 1)
    desk.take(Notice(text="x"), 1, peer=b"p1", rank=1)
    desk.take(Notice(text="x"), 2, peer=b"p1", rank=1)
    acks = {routing_id: message for routing_id, _, message in desk.reception.commit(0.0)}
    assert {key: ack.committed.tolist() for key, ack in acks.items() if isinstance(ack, Ack)} == {
        b"p0": [[1, 1]],
        b"p1": [[1, 2]],
    }


def test_chunks_are_joined_and_journaled_whole(desk: Desk) -> None:
    desk.greeted()
    frame = desk.frame(Notice(text="n" * 5_000), 1)
    chunks = split(Envelope(run_id="run", incarnation="inc", rank=0, sequence=1), frame, 1_000)
    assert len(chunks) > 4
    for chunk in chunks:
        assert desk.reception.take(b"p0", chunk, 0.0) == []
    desk.reception.commit(0.0)
    (row,) = desk.journal.segments.since(0, 10)
    assert row.body == frame


def test_one_rank_is_asked_for_a_table_and_the_next_when_it_does_not_send(desk: Desk) -> None:
    assert set(desk.greeted().wanted) == set(TABLES.values())
    assert desk.greeted(b"p1", rank=1).wanted == ()
    desk.take(Notice(text="x"), 1, peer=b"p1", rank=1, now=11.0)
    ack = only(desk.reception.commit(11.1))
    assert isinstance(ack, Ack)
    assert set(ack.wanted) == set(TABLES.values())


def test_a_table_is_stored_once_it_is_what_its_digest_says(desk: Desk) -> None:
    desk.greeted()
    name = digest(GROUPS)
    assert desk.take(Blob(digest=name, content=b"something else")) == []
    assert desk.journal.index.blob(name) is None
    ack = only(desk.take(Blob(digest=name, content=CONTENTS[name])))
    assert isinstance(ack, Ack)
    assert name not in ack.wanted
    assert desk.journal.index.blob(name) == GROUPS


def test_an_undecodable_message_is_refused_by_its_number(desk: Desk) -> None:
    desk.greeted()
    desk.feed.take_events()
    broken = bytearray(desk.frame(step_messages(0)[1], 7))
    at = bytes(broken).index(b"labelled") + len(b"labelled")
    broken[at] = 0xC0  # a nil where a number belongs
    refuse = only(desk.reception.take(b"p0", bytes(broken), 0.0))
    assert isinstance(refuse, Refuse)
    assert refuse.sequence == 7
    assert desk.feed.take_events() == [Refused(run_id="run", incarnation="inc", rank=0, sequence=7)]
    assert not desk.reception.waits


@pytest.mark.parametrize("rubbish", [b"", b"GET / HTTP/1.1\r\n\r\n", b"SST" + b"\x00" * 13, b"\xff" * 100])
def test_rubbish_is_counted_and_not_answered(desk: Desk, rubbish: bytes) -> None:
    desk.greeted()
    replies = desk.reception.take(b"p0", rubbish, 0.0)
    assert all(isinstance(message, Reject) for _, _, message in replies)
    assert desk.reception.statistics()["frames"] == 2
    assert not desk.reception.waits


def test_another_major_version_is_rejected_once(desk: Desk) -> None:
    frame = bytearray(desk.frame(Notice(text="x"), 1))
    frame[4] = WIRE_MAJOR + 1
    reject = only(desk.reception.take(b"p0", bytes(frame), 0.0))
    assert isinstance(reject, Reject)
    assert f"{WIRE_MAJOR + 1}.{WIRE_MINOR}" in reject.reason
    assert desk.reception.take(b"p0", bytes(frame), 0.0) == []
    assert desk.reception.statistics()["rejected"] == 2


def test_a_kind_of_a_later_version_is_journaled_raw_and_acked(desk: Desk) -> None:
    desk.greeted()
    frame = bytearray(desk.frame(Notice(text="x"), 1))
    frame[3] = 30
    desk.reception.take(b"p0", bytes(frame), 0.0)
    assert isinstance(only(desk.reception.commit(0.0)), Ack)
    (row,) = desk.journal.segments.since(0, 10)
    assert (row.kind, row.body) == (30, bytes(frame))


def test_a_full_disk_gives_no_ack_and_nothing_is_lost(desk: Desk) -> None:
    desk.greeted()
    writer = desk.journal.segments._writer
    assert writer is not None
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count={pages}")
    desk.take(Notice(text="z" * 50_000), 1, now=1.0)
    answer = only(desk.reception.commit(1.0))
    assert isinstance(answer, NoAck)
    assert "full" in answer.reason
    assert "full" in desk.reception.failure
    assert not desk.reception.commit_due(1.0 + RETRY_SECONDS / 2)
    writer.execute("PRAGMA max_page_count=1000000")
    assert desk.reception.commit_due(1.0 + RETRY_SECONDS)
    assert isinstance(only(desk.reception.commit(1.0 + RETRY_SECONDS)), Ack)
    assert desk.reception.failure == ""
    assert [each.key for each in desk.feed.take()] == [(0, 1)]


def test_notices_go_to_the_lowest_rank_and_commands_to_all(desk: Desk) -> None:
    desk.reception.send("run", Notice(text="look"))
    assert desk.reception.outgoing() == []
    desk.greeted(b"p1", rank=1)
    desk.greeted()
    desk.reception.send("run", Command(action="stop"))
    desk.reception.send("another", Notice(text="not for these"))
    said = [(routing_id, type(message).__name__) for routing_id, _, message in desk.reception.outgoing()]
    assert said == [(b"p0", "Notice"), (b"p0", "Command"), (b"p1", "Command")]
    desk.reception.gone(b"p0")
    desk.reception.send("run", Notice(text="again"))
    assert [routing_id for routing_id, _, _ in desk.reception.outgoing()] == [b"p1"]


def test_a_restarted_reception_knows_hellos_and_what_is_on_disk(desk: Desk, tmp_path: Path) -> None:
    desk.greeted()
    desk.take(Notice(text="x"), 1)
    desk.reception.commit(0.0)
    desk.journal.close()
    again = Desk(tmp_path / "journal")
    try:
        welcome = only(again.take(Notice(text="y"), 2))
        assert isinstance(welcome, Welcome)
        assert welcome.hello_known
        assert welcome.committed.tolist() == [[1, 1]]
        assert again.reception.waits
    finally:
        again.journal.close()
