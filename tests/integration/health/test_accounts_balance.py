"""A publisher and a worker process through refusals, a stop, a kill and a full window: the accounts balance throughout.

At every step ``produced == accepted + refused + dropped + in_window`` on the publisher's side. In the end the run says
of its messages what the publisher and the journal say (docs/delivery.md, section 6; docs/sidecar_metrics.md).
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.support.wire_trainer import CONTENTS, make_hello, step_messages
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol import frames
from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import Generation, Kind, LearningRates, Message, StepEnd
from sidestep.trainer_hooks.accounts import KindAccount
from sidestep.trainer_hooks.publisher import Publisher
from sidestep.worker.intake.schema import unpack_pairs

RUN_ID = "balanced"
WINDOW_BYTES = 256 << 10
ILL_STEP = 7


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess("--assembly-deadline-seconds", "1")
    yield made
    made.remove()


def generation(step: int) -> Generation:
    """50 KB that are given up first."""
    ids = np.zeros(12_500, np.int32)
    return Generation(step=step, samples=ids[:1], offsets=np.array([0, ids.size], np.int64), ids=ids)


class Trainer:
    """A publisher whose accounts are looked at after every message."""

    def __init__(self, address: str) -> None:
        identity = Envelope(run_id=RUN_ID, incarnation="inc-1", rank=0)
        self.publisher = Publisher(address, identity, make_hello(), blobs=CONTENTS, window_bytes=WINDOW_BYTES).start()
        self.submitted: Counter[Kind] = Counter()
        self.num_looks = 0
        self.step = -1

    def account(self, kind: Kind) -> KindAccount:
        """Return a kind's account as of the last tick, which may have seen nothing of it yet."""
        nothing = KindAccount(produced=0, accepted=0, refused=0, dropped=0, in_window=0)
        return self.publisher.accounts().get(kind, nothing)

    def look(self) -> None:
        for kind, account in self.publisher.accounts().items():
            settled = account.accepted + account.refused + account.dropped
            assert account.produced == settled + account.in_window, (self.step, kind, account)
            # It makes a StepEnd anew where a part of it was given up after it had left.
            own = {Kind.STEP_END, Kind.GOODBYE}
            assert kind in own or account.produced <= self.submitted[kind], (self.step, kind, account)
        self.num_looks += 1

    def train(self, num_steps: int, *, bulky: bool = False) -> None:
        for _ in range(num_steps):
            self.step += 1
            for message in (*([generation(self.step)] if bulky else []), *step_messages(self.step)):
                self._submit(message, bulky=bulky)
            time.sleep(0.02)
            self.look()

    def _submit(self, message: Message, *, bulky: bool) -> None:
        if isinstance(message, StepEnd) and bulky:
            message = StepEnd(
                step=message.step, unix_time=message.unix_time, due=message.due,
                sent={**message.sent, "generation": 1},
            )  # fmt: skip
        self.submitted[message.kind] += 1
        self.publisher.submit(message)
        self.look()

    def is_settled(self) -> bool:
        self.look()
        accounts = self.publisher.accounts()
        counts = Counter({kind: account.produced for kind, account in accounts.items()})
        return counts >= self.submitted and not any(account.in_window for account in accounts.values())


def damage_one_message(patch: pytest.MonkeyPatch) -> None:
    """Let the rates of one step leave with a head that says what no version says, as a faulty link could make it."""
    encode = frames.encode

    def damaged(envelope: Envelope, message: Message) -> bytes:
        frame = encode(envelope, message)
        is_it = isinstance(message, LearningRates) and message.step == ILL_STEP
        return frame.replace(b"float64", b"flaot64") if is_it else frame

    patch.setattr(frames, "encode", damaged)


def last_told(worker: WorkerProcess) -> dict[str, Any]:
    """Return the newest value of each key of the run's rows."""
    told: dict[str, Any] = {}
    for kind, value in worker.outbox():
        if kind == "row":
            told.update(value)
    return told


def used_messages(worker: WorkerProcess) -> list[tuple[int, int]]:
    """Return (rank, sequence) of all that the closings name."""
    closings = worker.query("SELECT parts, late_parts FROM step_closed ORDER BY closed_number")
    return [key for parts, late in closings for key in (*unpack_pairs(parts), *unpack_pairs(late))]


def test_the_accounts_balance_at_every_step_and_the_run_ends_with_the_publishers_own(
    worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_one_message(monkeypatch)
    worker.start()
    assert worker.process is not None
    trainer = Trainer(worker.address)
    try:
        trainer.train(12)
        wait_until(lambda: trainer.account(Kind.LEARNING_RATES).refused == 1, "one message is refused")
        wait_until(trainer.is_settled, "the rest is stored")
        os.kill(worker.process.pid, signal.SIGSTOP)
        trainer.train(10)  # they leave, and nobody reads them
        worker.kill()
        trainer.train(20, bulky=True)  # a megabyte into a window of a quarter
        wait_until(lambda: trainer.account(Kind.GENERATION).dropped > 0, "the window is full")
        worker.start()
        trainer.train(5)
        wait_until(trainer.is_settled, "all that is left is stored")
    finally:
        trainer.publisher.close(20.0)
    wait_until(lambda: worker.query("SELECT * FROM ending"), "the run ends")
    trainer.look()
    assert trainer.num_looks > 47
    accounts, statistics = trainer.publisher.accounts(), trainer.publisher.statistics()
    told = last_told(worker)

    assert accounts[Kind.GENERATION].dropped > 0
    assert statistics.num_resends > 0
    for kind, account in accounts.items():
        assert account.in_window == 0
        assert told.get(f"sidecar/dropped/{kind.name.lower()}", 0) == account.dropped
        assert told.get(f"sidecar/refused/{kind.name.lower()}", 0) == account.refused
    assert told["sidecar/refused"] == sum(account.refused for account in accounts.values()) == 1
    assert told["sidecar/resent"] == statistics.num_resends

    kinds = [
        kind for segment in sorted(worker.journal.glob("segment-*.sqlite"))
        for (kind,) in worker.query("SELECT kind FROM message", segment.name)
    ]  # fmt: skip
    stored = Counter(Kind(kind) for kind in kinds)
    assert stored == Counter({kind: account.accepted for kind, account in accounts.items() if account.accepted})
    used = used_messages(worker)
    assert len(set(used)) == len(used), "no message is in two closings"
    num_goodbyes_used = len(used) - told["sidecar/journal_rows"]
    assert num_goodbyes_used in {0, 1}
    unused = sum(stored.values()) - told["sidecar/journal_rows"]
    repeats = stored[Kind.STEP_END] - (trainer.step + 1)
    assert stored[Kind.GOODBYE] <= unused <= stored[Kind.GOODBYE] + repeats
    replayed = worker.run("replay", str(worker.journal), "--out", str(worker.folder / "again"))
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "differs" not in replayed.stdout
