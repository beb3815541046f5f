"""Trainers that are killed and come back, some at an earlier step, under workers that are killed too."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.support.rank_process import RankProcess
from tests.support.run_balance import check_balance, late_parts, num_answers, rows_of
from tests.support.wire_trainer import step_messages
from tests.support.worker_process import WorkerProcess, wait_until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess("--trainer-silence-seconds", "1")
    made.start()
    yield made
    made.remove()


def again(worker: WorkerProcess) -> None:
    worker.kill()
    worker.start()


def finish(worker: WorkerProcess, num_attempts: int) -> None:
    wait_until(lambda: len(worker.query("SELECT * FROM ending")) >= num_attempts, "all attempts end", 60.0)
    assert worker.terminate() == 0


def steps(worker: WorkerProcess) -> list[tuple[int, int]]:
    return [(attempt, step) for attempt, step, reason in worker.closed_steps() if reason != "tail"]


def num_stored(worker: WorkerProcess) -> int:
    return int(worker.query("SELECT COUNT(*) FROM message", "segment-000001.sqlite")[0][0])


def has_closed(worker: WorkerProcess, step: tuple[int, int]) -> bool:
    return step in steps(worker)


def test_a_resume_at_an_earlier_step_repeats_its_steps_and_counts_them_once(
    worker: WorkerProcess, tmp_path: Path
) -> None:
    with RankProcess(worker.address) as first:
        first.steps(0, 70)
        first.flush()
        again(worker)
        first.steps(70, 150)
        first.flush()
        first.kill()
    worker.kill()  # before it has noticed
    worker.start()
    with RankProcess(worker.address, incarnation="inc-2", start_step=100) as second:
        second.steps(100, 110)
        second.flush()
        again(worker)
        second.steps(110, 120)
        second.flush()
        second.kill()
    again(worker)
    with RankProcess(worker.address, incarnation="inc-3", start_step=60) as third:
        third.steps(60, 125)
        again(worker)
        third.close()
    finish(worker, 3)
    assert steps(worker) == [
        *((0, step) for step in range(150)),
        *((1, step) for step in range(100, 120)),
        *((2, step) for step in range(60, 125)),
    ]
    rows = rows_of(worker.journal)
    counted = {(row["train/attempt"], row["train/step"]): num_answers(row) for row in rows if "epoch" in row}
    assert counted == {(attempt, step): step + 1 for attempt, step in steps(worker)}
    assert worker.query("SELECT attempt, step, is_exact FROM rewind") == [(1, 100, 1), (2, 60, 1)]
    assert late_parts(rows) == {}
    check_balance(worker.journal, tmp_path / "replayed")


def test_what_a_killed_trainer_had_on_its_way_is_in_the_run_though_the_next_one_was_heard_first(
    worker: WorkerProcess, tmp_path: Path
) -> None:
    """The worker stands still while one trainer dies and another says Hello."""
    assert worker.process is not None
    with RankProcess(worker.address) as first:
        first.steps(0, 10)
        first.flush()
        worker.process.send_signal(signal.SIGSTOP)
        with RankProcess(worker.address, incarnation="inc-2", start_step=12) as second:
            second.steps(12, 16)
            first.steps(10, 14)
            first.send()
            first.kill()
            worker.process.send_signal(signal.SIGCONT)
            second.flush()
            # Of two connections either is read first, and nobody sends again what the first one had on its way.
            wait_until(
                lambda: num_stored(worker) == (14 + 4) * len(step_messages(0)), "all that was on its way is stored"
            )
            worker.kill()
            worker.start()
            second.steps(16, 20)
            second.close()
    finish(worker, 2)
    assert steps(worker) == [*((0, step) for step in range(14)), *((1, step) for step in range(12, 20))]
    rows = rows_of(worker.journal)
    assert num_answers(next(row for row in reversed(rows) if "epoch" in row)) == 20
    assert late_parts(rows) == {}
    check_balance(worker.journal, tmp_path / "replayed")


def test_attempts_of_two_one_and_three_ranks(worker: WorkerProcess, tmp_path: Path) -> None:
    for attempt, (world_size, first, last) in enumerate(((2, 0, 12), (1, 6, 14), (3, 10, 20))):
        ranks = [
            RankProcess(
                worker.address, incarnation=f"inc-{attempt}", rank=rank, world_size=world_size, start_step=first
            )
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.steps(first, last)
        ranks[0].flush()
        if attempt != 1:
            again(worker)
        for rank in ranks:
            rank.close()
            rank.__exit__(None, None, None)
        newest = (attempt, last - 1)
        wait_until(partial(has_closed, worker, newest), "the attempt's steps close")
        again(worker)
    finish(worker, 3)
    assert set(worker.query("SELECT attempt, ranks_expected, reason FROM step_closed WHERE reason <> 'tail'")) == {
        (0, 2, "complete"),
        (1, 1, "complete"),
        (2, 3, "complete"),
    }
    rows = rows_of(worker.journal)
    counted = {(row["train/attempt"], row["train/step"]): num_answers(row) for row in rows if "epoch" in row}
    assert counted[0, 11] == 24
    assert counted[1, 6] == 2 * 6 + 1
    assert counted[1, 13] == 2 * 6 + 8
    assert counted[2, 10] == 2 * 6 + 4 + 3
    assert counted[2, 19] == 2 * 6 + 4 + 30
    check_balance(worker.journal, tmp_path / "replayed")
