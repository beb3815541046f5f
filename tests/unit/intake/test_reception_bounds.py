"""What a hostile peer may cost: nothing that it says ends the receiver, opens streams or fills memory without end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.wire_trainer import CONTENTS, GROUPS, make_hello

from sidestep.protocol.frames import Envelope, encode, split
from sidestep.protocol.messages import Ack, Blob, Heartbeat, Hello, Message, Notice, Refuse, Reject, Welcome
from sidestep.protocol.tables import digest
from sidestep.worker.intake import reception as reception_module
from sidestep.worker.intake.feed import Feed, Refused
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.peers import Peers
from sidestep.worker.intake.reception import Reception, Reply


class Desk:
    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder)
        self.feed = Feed(self.journal.segments, limit_bytes=1 << 20, start_arrival=self.journal.segments.next_arrival)
        self.reception = Reception(
            self.journal, self.feed, instance="worker-1", commit_interval_seconds=0.02, commit_messages=1_000
        )

    def take(
        self,
        message: Message,
        sequence: int = 0,
        *,
        peer: bytes = b"p",
        run_id: str = "run",
        incarnation: str = "inc",
        rank: int = 0,
    ) -> list[Reply]:
        said = Envelope(run_id=run_id, incarnation=incarnation, rank=rank, sequence=sequence)
        return self.reception.take(peer, encode(said, message), 0.0)

    def count(self, name: str) -> int:
        return self.reception.statistics().get(name, 0)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "journal")
    made.take(make_hello(world_size=2))
    yield made
    assert isinstance(last(made.take(Notice(text="still here"), 1 << 40)), Welcome | None)
    assert any(isinstance(message, Ack) for _, _, message in made.reception.commit(1.0))
    made.journal.close()


def last(replies: list[Reply]) -> Message | None:
    return replies[-1][2] if replies else None


def test_another_run_cannot_take_an_incarnation(desk: Desk) -> None:
    answer = last(desk.take(make_hello(world_size=2), peer=b"q", run_id="theirs", rank=1))
    assert isinstance(answer, Reject)
    assert "another run" in answer.reason
    assert desk.journal.index.runs() == ["run"]
    refuse = last(desk.take(Notice(text="x"), 1, peer=b"q", run_id="theirs"))
    assert isinstance(refuse, Refuse)
    desk.take(Notice(text="x"), 1, run_id="theirs")  # nor on a connection that was let in under its own name
    desk.reception.commit(0.0)
    assert desk.journal.segments.streams() == []
    assert not [event for event in desk.feed.take_events() if isinstance(event, Refused)]


@pytest.mark.parametrize("rank", [2, 1 << 40])
def test_a_rank_that_the_world_does_not_have_is_refused(desk: Desk, rank: int) -> None:
    assert isinstance(last(desk.take(make_hello(world_size=rank + 1), peer=b"q", rank=rank)), Reject)
    assert isinstance(last(desk.take(Notice(text="x"), 1, peer=b"q", rank=rank)), Refuse)
    assert (desk.count("journaled"), desk.count("waiting")) == (0, 0)


def test_a_refused_hello_is_told_once_and_leaves_nothing(desk: Desk) -> None:
    hello = make_hello(world_size=1 << 62)
    answers = [desk.take(hello, peer=b"q", incarnation="new") for _ in range(3)]
    assert [len(each) for each in answers] == [1, 0, 0]
    assert [each.incarnation for each in desk.journal.index.incarnations()] == ["inc"]
    assert desk.count("rejected") == 3


def test_strangers_are_greeted_and_not_remembered_one_by_one(desk: Desk) -> None:
    for number in range(200):
        desk.take(Heartbeat(), peer=b"q", incarnation=f"stranger-{number}", rank=number)
    assert desk.count("peers") == 2
    assert set(desk.reception.last_heard) == {"inc"}
    assert desk.reception.account("stranger-1") == (0, 0)


def test_a_table_that_nobody_named_is_not_stored(desk: Desk) -> None:
    assert desk.take(Blob(digest=digest(b"mine"), content=b"mine")) == []
    assert desk.journal.index.blob(digest(b"mine")) is None
    assert isinstance(last(desk.take(Blob(digest=digest(GROUPS), content=CONTENTS[digest(GROUPS)]))), Ack)
    assert desk.take(Blob(digest=digest(GROUPS), content=GROUPS)) == []
    assert desk.count("misplaced") == 2


def test_a_stream_is_not_torn_without_end(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reception_module, "MAX_HOLES", 5)
    answers = [last(desk.take(Notice(text="x"), sequence)) for sequence in range(2, 40, 2)]
    assert answers[:5] == [None] * 5
    assert all(isinstance(answer, Refuse) for answer in answers[5:])
    assert desk.take(Notice(text="x"), 3) == []  # fills a hole
    assert desk.count("waiting") == 6
    desk.take(Notice(text="x"), 1 << 40)
    desk.take(Notice(text="x"), 1)
    desk.take(Notice(text="x"), 5)


def test_small_messages_count_with_what_they_take_in_memory(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reception_module, "MAX_WAITING_BYTES", 100_000)
    sequence = 0
    while not desk.reception.is_full:
        sequence += 1
        desk.take(Notice(text="x"), sequence)
    assert sequence < 50


def test_a_stranger_may_send_a_hello_in_chunks_and_no_more(desk: Desk) -> None:
    said = Envelope(run_id="other", incarnation="other-1", rank=0)
    hello = Hello(run_config={"x": "y" * 600_000})
    for chunk in split(said, encode(said, hello), 100_000):
        desk.reception.take(b"q", chunk, 0.0)
    assert list(desk.journal.index.hellos("other-1")) == [0]
    large = Envelope(run_id="other", incarnation="other-2", rank=0)
    frame = encode(large, Blob(digest="d", content=bytes(20 << 20)))
    desk.reception.take(b"r", split(large, frame)[0], 0.0)
    assert desk.reception._peers.get(b"r") is None
    assert desk.reception._peers.joining_bytes == 0


def test_all_connections_together_join_within_one_bound() -> None:
    peers = Peers(max_peers=6, max_joining_bytes=1_000_000)
    for number in range(20):
        envelope = Envelope(run_id="run", incarnation="inc", rank=number)
        frame = encode(envelope, Blob(digest=str(number), content=bytes(300_000)))
        peer, _ = peers.meet(b"%d" % number, envelope, 0.0)
        peers.join(peer, split(envelope, frame, 100_000)[0])
        assert peers.joining_bytes <= 1_000_000
        held = sum(each.joiner.held_bytes for each in peers._peers.values())
        assert peers.joining_bytes == held
    assert len(peers) == 6


def test_a_flood_of_refused_numbers_does_not_fill_the_feed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidestep.worker.intake.feed.MAX_EVENTS", 10)
    for sequence in range(100):
        desk.feed.tell(Refused("run", "inc", 0, sequence))
    assert desk.feed.left_out == 100 - 10 + 1  # the Hello's event was there
    assert len(desk.feed.take_events()) == 10
