from __future__ import annotations

from pathlib import Path

import pytest

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.messages import Notice
from sidestep.worker.intake.assembly import Journaled, journaled
from sidestep.worker.intake.feed import Feed, HelloArrived
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.segments import Row


class Source:
    def __init__(self, folder: Path, *, limit_bytes: int, before: int = 0) -> None:
        self.journal = Journal(folder)
        self.commit(before)
        self.feed = Feed(self.journal.segments, limit_bytes=limit_bytes, start_arrival=0)

    def commit(self, count: int) -> list[tuple[Journaled, int]]:
        first = self.journal.segments.next_arrival
        rows = []
        for arrival in range(first, first + count):
            envelope = Envelope(run_id="run", incarnation="inc", rank=0, sequence=arrival + 1)
            rows.append(Row("inc", 0, arrival + 1, 13, -1, 1, 0, 0.0, arrival, encode(envelope, Notice(text="x"))))
        self.journal.segments.append(rows)
        return [(journaled(row), 100) for row in rows]

    def drain(self) -> list[int]:
        taken = []
        while messages := self.feed.take(3):
            taken += [each.arrival for each in messages]
        return taken


@pytest.mark.parametrize("limit_bytes", [0, 250, 1_000_000])
def test_everything_comes_once_and_in_order_whatever_fits(tmp_path: Path, limit_bytes: int) -> None:
    source = Source(tmp_path, limit_bytes=limit_bytes)
    for _ in range(5):
        source.feed.offer(source.commit(4))
    assert source.drain() == list(range(20))
    source.feed.offer(source.commit(2))
    assert source.drain() == [20, 21]
    source.journal.close()


def test_a_restart_begins_with_what_is_on_disk(tmp_path: Path) -> None:
    source = Source(tmp_path, limit_bytes=1_000_000, before=7)
    source.feed.offer(source.commit(2))
    assert source.drain() == list(range(9))
    assert source.feed.read_back == 9
    source.journal.close()


def test_what_was_committed_but_not_offered_yet_is_not_taken_twice(tmp_path: Path) -> None:
    source = Source(tmp_path, limit_bytes=1_000_000, before=2)
    batch = source.commit(2)
    assert source.drain() == [0, 1, 2, 3]
    source.feed.offer(batch)
    source.feed.offer(source.commit(1))
    assert source.drain() == [4]
    assert source.feed.held_bytes == 0
    source.journal.close()


def test_events_wake_and_come_in_order(tmp_path: Path) -> None:
    source = Source(tmp_path, limit_bytes=100)
    events = [HelloArrived(run_id="run", incarnation=name) for name in "ab"]
    for event in events:
        source.feed.tell(event)
    source.feed.wait(30.0)
    assert source.feed.take_events() == events
    assert source.feed.take_events() == []
    source.journal.close()
