"""Ranks that are late, come late, or never, over kills of the worker: counted once, said once, replayed the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.rank_process import RankProcess
from tests.support.run_balance import PARTS_OF_A_STEP, check_balance, late_parts, num_answers, rows_of
from tests.support.worker_process import WorkerProcess, wait_until

pytestmark = pytest.mark.timeout(120)
DEADLINE_SECONDS = 2.5


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess(
        "--trainer-silence-seconds", "1", "--assembly-deadline-seconds", str(DEADLINE_SECONDS)
    )  # fmt: skip
    made.start()
    yield made
    made.remove()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def again(worker: WorkerProcess, ranks: Sequence[RankProcess]) -> None:
    """Start the worker anew, and wait until it knows its ranks: none is late for want of a connection."""
    before = [rank.accounts()["welcomes"] for rank in ranks]
    worker.kill()
    worker.start()
    for rank, num_welcomes in zip(ranks, before, strict=True):
        rank.greeted(num_welcomes + 1)


def reasons(worker: WorkerProcess) -> dict[int, str]:
    return {step: reason for _, step, reason in worker.closed_steps() if reason != "tail"}


def finish(worker: WorkerProcess) -> None:
    wait_until(lambda: worker.query("SELECT * FROM ending"), "the run ends", 60.0)
    assert worker.terminate() == 0


def test_a_rank_whose_messages_come_after_the_deadline_and_a_restart(
    worker: WorkerProcess, stack: ExitStack, tmp_path: Path
) -> None:
    ranks = [stack.enter_context(RankProcess(worker.address, rank=rank, world_size=2)) for rank in (0, 1)]
    for rank in ranks:
        rank.greeted()
    for rank in ranks:
        rank.steps(0, 3)
        rank.flush()
    ranks[0].steps(3, 5)
    wait_until(lambda: reasons(worker).get(4) == "deadline", "the deadline passes")
    again(worker, ranks)
    ranks[1].steps(3, 5)
    ranks[1].flush()
    again(worker, ranks)  # what came late is journaled, and waits for the next closing
    for rank in ranks:
        rank.steps(5, 8)
    for rank in ranks:
        rank.close()
    finish(worker)
    assert reasons(worker) == {
        step: "deadline" if step in {3, 4} else "complete" for step in range(8)
    }  # fmt: skip
    rows = rows_of(worker.journal)
    assert late_parts(rows) == {(0, 5): 2 * PARTS_OF_A_STEP}
    assert {row["train/step"]: row["sidecar/ranks_seen"] for row in rows if "sidecar/ranks_seen" in row} == {3: 1, 4: 1}
    counted = {row["train/step"]: num_answers(row) for row in rows if "epoch" in row}
    assert counted == {0: 2, 1: 4, 2: 6, 3: 7, 4: 8, 5: 12, 6: 14, 7: 16}
    check_balance(worker.journal, tmp_path / "replayed")


def test_a_rank_that_comes_late_with_its_hello_and_one_that_never_comes(
    worker: WorkerProcess, stack: ExitStack, tmp_path: Path
) -> None:
    ranks = [stack.enter_context(RankProcess(worker.address, rank=rank, world_size=3)) for rank in (0, 1)]
    for rank in ranks:
        rank.greeted()
    for rank in ranks:
        rank.steps(0, 2)
    wait_until(lambda: reasons(worker) == {0: "deadline", 1: "deadline"}, "they close without rank 2")
    again(worker, ranks)
    ranks.append(stack.enter_context(RankProcess(worker.address, rank=2, world_size=3)))
    ranks[2].greeted()
    for rank in ranks:
        rank.steps(2, 6)
        rank.flush()
    wait_until(lambda: len(reasons(worker)) == 6, "all three are here")
    ranks.pop().kill()
    again(worker, ranks)
    for rank in ranks:
        rank.steps(6, 8)
    wait_until(lambda: len(reasons(worker)) == 8, "they close without rank 2 again")
    for rank in ranks:
        rank.close()
    finish(worker)
    assert reasons(worker) == {
        step: "complete" if step in range(2, 6) else "deadline" for step in range(8)
    }  # fmt: skip
    assert worker.query("SELECT revision, LENGTH(ranks) / 16 FROM context ORDER BY revision") == [(0, 2), (1, 3)]
    rows = rows_of(worker.journal)
    seen = {row["train/step"]: row["sidecar/ranks_seen"] for row in rows if "sidecar/ranks_seen" in row}
    assert seen == {0: 2, 1: 2, 6: 2, 7: 2}
    assert [row["sidecar/tail_unknown"] for row in rows if "sidecar/tail_unknown" in row] == [1]
    assert num_answers(next(row for row in reversed(rows) if "epoch" in row)) == 2 * 2 + 4 * 3 + 2 * 2
    assert late_parts(rows) == {}
    check_balance(worker.journal, tmp_path / "replayed")
