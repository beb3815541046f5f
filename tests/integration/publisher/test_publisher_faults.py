"""The publisher against a worker that is absent, late, killed, stopped, full, picky or hostile."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from tests.support.publisher_trainer import Trainer, end, generation, losses

from sidestep.protocol.messages import (
    Generation,
    Kind,
    Losses,
    StepEnd,
)
from sidestep.protocol.ranges import RangeSet
from sidestep.trainer_hooks.conversation import Patience

if TYPE_CHECKING:
    from tests.integration.publisher.conftest import RouterWorker

MakeWorker: TypeAlias = "Callable[..., RouterWorker]"
Eventually: TypeAlias = Callable[[Callable[[], object]], None]


def test_a_worker_that_comes_late_gets_everything_once_and_hello_first(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    trainer = make_trainer()
    for step in range(50):
        trainer.publisher.submit(losses(step))
    eventually(lambda: trainer.publisher.statistics().num_unsent == 50)
    assert trainer.publisher.statistics().num_frames_sent <= 1, "nothing but Hello leaves before a Welcome"
    worker = make_worker().start()
    eventually(lambda: trainer.accepted() == 50)
    assert worker.kinds[0] is Kind.HELLO
    assert worker.arrivals == list(range(1, 51))
    assert worker.envelopes[-1].rank == 3
    trainer.assert_exact()


def test_a_worker_killed_and_restarted_gets_exactly_what_its_journal_lacks(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    first = make_worker()
    first.acking = False  # it committed 1..6, nobody heard of it, and 7..10 died with it
    first.commit_at_most = 6
    first.start()
    trainer = make_trainer()
    for step in range(10):
        trainer.publisher.submit(losses(step))
    eventually(lambda: len(first.arrivals) == 10)
    first.stop()
    for step in range(10, 15):
        trainer.publisher.submit(losses(step))
    second = make_worker(RangeSet(first.committed)).start()
    eventually(lambda: trainer.accepted() == 15)
    assert sorted(set(second.arrivals)) == list(range(7, 16))
    assert list(dict.fromkeys(n for n in second.arrivals if n <= 10)) == [7, 8, 9, 10]
    assert len(second.committed) == 15
    assert trainer.publisher.statistics().num_connections == 1, "ZeroMQ reconnects by itself"


def test_many_kills_lose_nothing(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    trainer = make_trainer()
    committed = RangeSet()
    for round_number in range(4):
        worker = make_worker(RangeSet(committed)).start()
        for step in range(20):
            trainer.publisher.submit(losses(round_number * 20 + step))
        eventually(lambda: worker.arrivals)  # noqa: B023  (called at once)
        worker.stop()
        committed = worker.committed
    last = make_worker(committed).start()
    eventually(lambda: trainer.accepted() == 80)
    assert last.committed.covers(1, 80)
    trainer.assert_exact()


def test_a_worker_that_stops_reading_costs_the_trainer_nothing(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    worker = make_worker().start()
    trainer = make_trainer()
    trainer.publisher.submit(losses(0))
    eventually(lambda: trainer.accepted() == 1)
    worker.reading = False
    for step in range(1, 600):
        trainer.publisher.submit(losses(step, 2_000))
    eventually(lambda: trainer.publisher.statistics().num_unacked > 40)
    worker.reading = True
    eventually(lambda: trainer.accepted() == 600)
    assert worker.arrivals == list(range(1, 601)), "a pause loses nothing and repeats nothing"


def test_a_full_window_drops_by_lane_counts_exactly_and_corrects_step_ends(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    worker = make_worker().start()
    trainer = make_trainer(window_bytes=256 << 10)
    trainer.publisher.submit(losses(0))
    eventually(lambda: trainer.accepted() == 1)
    worker.reading = False
    for step in range(1, 120):
        trainer.publisher.submit(losses(step, 1_000))
        trainer.publisher.submit(generation(step, 1_000))
        trainer.publisher.submit(end(step, losses=1, generation=1))
        time.sleep(0.002)
        trainer.assert_exact()
        assert trainer.publisher.statistics().window_bytes <= 256 << 10
    eventually(lambda: trainer.produced(Kind.GENERATION) == 119)  # accounts are those of the last tick
    accounts = trainer.publisher.accounts()
    assert accounts[Kind.GENERATION].dropped > accounts[Kind.LOSSES].dropped > 0
    worker.reading = True
    eventually(lambda: sum(account.in_window for account in trainer.publisher.accounts().values()) == 0)
    trainer.assert_exact()
    arrived = Counter(
        (m.step, m.kind.name.lower()) for m in worker.stored.values() if isinstance(m, Losses | Generation)
    )
    ends = {m.step: m for _, m in sorted(worker.stored.items()) if isinstance(m, StepEnd)}
    assert sorted(ends) == list(range(1, 120)), "no StepEnd is ever dropped"
    for step, step_end in ends.items():
        for name in ("losses", "generation"):
            assert step_end.sent[name] == arrived[step, name]
            assert step_end.sent[name] + step_end.dropped.get(name, 0) == 1


def test_chunks_and_blobs_arrive_whole(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    table = np.random.default_rng(0).bytes(900_000)
    digest = hashlib.sha256(table).hexdigest()
    worker = make_worker()
    worker.wanted = (digest,)
    worker.start()
    trainer = make_trainer(blobs={digest: table})
    trainer.publisher.submit(losses(7, 500_000))
    trainer.publisher.submit(end(7, losses=1))
    eventually(lambda: trainer.accepted() == 2)
    assert worker.blobs == {digest: table}
    assert worker.arrivals == [1, 2]
    large = worker.stored[1]
    assert isinstance(large, Losses)
    assert np.array_equal(large.losses, np.full(500_000, 7, np.float32))


def test_a_refused_message_is_counted_and_the_others_go_on(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    worker = make_worker()
    worker.refused = {2}
    worker.start()
    trainer = make_trainer()
    for step in range(3):
        trainer.publisher.submit(losses(step))
    eventually(lambda: trainer.publisher.accounts().get(Kind.LOSSES) is not None and trainer.accepted() == 2)
    eventually(lambda: trainer.publisher.accounts()[Kind.LOSSES].refused == 1)
    trainer.assert_exact()
    trainer.publisher.close(5)
    assert worker.envelopes[-1].accounts["losses"] == (3, 0, 1)


def test_messages_that_no_disk_took_come_again(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    worker = make_worker()
    worker.no_ack_reason = "no space left"
    worker.start()
    trainer = make_trainer(patience=Patience(progress_seconds=0.3))
    for step in range(5):
        trainer.publisher.submit(losses(step))
    eventually(lambda: trainer.publisher.statistics().num_connections >= 2)
    assert trainer.accepted() == 0
    worker.no_ack_reason = ""
    eventually(lambda: trainer.accepted() == 5)
    assert trainer.lines == ["sidestep: the worker cannot store what it gets: no space left\n"]


def test_a_connection_without_progress_is_replaced(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    worker = make_worker()
    worker.acking = False
    worker.start()
    trainer = make_trainer(patience=Patience(progress_seconds=0.3))
    trainer.publisher.submit(losses(1))
    eventually(lambda: trainer.accepted() == 1)  # by the Welcome of the next connection, which names what is committed
    assert worker.num_peers >= 2
    assert trainer.publisher.statistics().num_connections >= 2


@contextmanager
def locked(address: str) -> Iterator[None]:
    """Listen as a worker with keys that says so at once, and leaves it to the other side to go."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + b"\x01" + bytes(31)
    path = Path(address.removeprefix("ipc://"))
    over = threading.Event()
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(0.05)

        def serve() -> None:
            while not over.is_set():
                with suppress(TimeoutError, ConnectionError):
                    peer = stack.enter_context(listening.accept()[0])
                    peer.sendall(greeting)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(20)
            path.unlink()


def test_a_failed_handshake_does_not_end_it_for_good(
    address: str, make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    with locked(address):
        trainer = make_trainer(patience=Patience(warning_seconds=600.0))
        trainer.publisher.submit(losses(1))
        eventually(lambda: trainer.publisher.statistics().num_handshake_failures >= 1)
    make_worker().start()
    eventually(lambda: trainer.accepted() == 1)
    assert [line for line in trainer.lines if "handshake" in line] == trainer.lines
    assert len(trainer.lines) == 1


def test_nonsense_from_the_worker_is_counted(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    worker = make_worker().start()
    trainer = make_trainer()
    trainer.publisher.submit(losses(1))
    eventually(lambda: trainer.accepted() == 1)
    for frame in (b"", b"nonsense", os.urandom(200)):
        worker.say(frame)
    eventually(lambda: trainer.publisher.statistics().num_undecodable == 3)
    trainer.publisher.submit(losses(2))
    eventually(lambda: trainer.accepted() == 2)
    assert trainer.publisher.statistics().num_errors == 0


def test_a_tick_sends_no_more_than_its_share(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    make_worker().start()
    trainer = make_trainer()
    for step in range(200):
        trainer.publisher.submit(losses(step))
    eventually(lambda: trainer.accepted() == 200)
    statistics = trainer.publisher.statistics()
    assert statistics.num_frames_sent <= 8 * statistics.num_ticks
    assert statistics.num_ticks >= 200 // 8


def test_repeats_share_the_tick_and_later_messages_say_how_many_there_were(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    first = make_worker()
    first.commit_at_most = 0  # all that it gets dies with it
    first.start()
    trainer = make_trainer()
    for step in range(150):
        trainer.publisher.submit(losses(step))
    eventually(lambda: len(first.arrivals) == 150)
    first.stop()
    second = make_worker().start()
    eventually(lambda: trainer.accepted() == 150)
    statistics = trainer.publisher.statistics()
    assert statistics.num_frames_sent <= 8 * statistics.num_ticks
    assert 150 <= statistics.num_resends <= len(second.arrivals)
    trainer.publisher.submit(losses(150))
    eventually(lambda: 151 in second.stored)
    assert second.envelopes[-1].resent == trainer.publisher.statistics().num_resends
    trainer.assert_exact()
