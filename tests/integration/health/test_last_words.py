"""What a Goodbye tells that no message before it told is in the run, once, live and in a replay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.wire_trainer import WireTrainer
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol.frames import Envelope


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess()
    made.start()
    yield made
    made.remove()


class TellingTrainer(WireTrainer):
    """A stream whose messages carry accounts."""

    accounts: dict[str, tuple[int, int, int]]
    resent = 0

    def envelope(self, sequence: int = 0) -> Envelope:
        return Envelope(
            run_id=self.run_id, incarnation=self.incarnation, rank=self.rank, sequence=sequence,
            accounts=self.accounts, resent=self.resent,
        )  # fmt: skip


def last_row(worker: WorkerProcess) -> dict[str, object]:
    return [value for kind, value in worker.outbox() if kind == "row"][-1]


def test_losses_after_the_last_step_are_the_runs_last_row(worker: WorkerProcess) -> None:
    with TellingTrainer(worker.address) as trainer:
        trainer.accounts = {"losses": (2, 1, 0), "step_end": (1, 0, 0)}
        trainer.greet()
        trainer.wait_for_acks(trainer.send_step(0))
        wait_until(worker.closed_steps, "the step closes")
        assert last_row(worker)["sidecar/dropped/losses"] == 1
        trainer.accounts = {"losses": (4, 3, 0), "step_end": (1, 0, 0), "goodbye": (1, 0, 0)}
        trainer.resent = 2
        trainer.wait_for_acks([trainer.goodbye(0)])
        wait_until(lambda: worker.query("SELECT * FROM ending"), "the run ends")
    assert worker.closed_steps() == [(0, 0, "complete"), (0, 0, "tail")]
    told = last_row(worker)
    assert told["sidecar/dropped/losses"] == 3
    assert (told["sidecar/resent"], told["sidecar/produced"], told["sidecar/journal_rows"]) == (2, 6, 4)
    assert "sidecar/tail_unknown" not in told
    outbox = worker.outbox()
    worker.kill()
    worker.start()
    assert worker.terminate() == 0
    assert worker.outbox() == outbox, "it is told once"
    replayed = worker.run("replay", str(worker.journal), "--out", str(worker.folder / "again"))
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr


def test_a_goodbye_without_news_writes_nothing(worker: WorkerProcess) -> None:
    with TellingTrainer(worker.address) as trainer:
        trainer.accounts = {"losses": (2, 1, 0)}
        trainer.greet()
        trainer.wait_for_acks([*trainer.send_step(0), trainer.goodbye(0)])
        wait_until(lambda: worker.query("SELECT * FROM ending"), "the run ends")
    assert worker.closed_steps() == [(0, 0, "complete")]
