"""A trainer's end of the wire: a publisher with the lines that it showed, and messages for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import (
    Generation,
    Hello,
    Kind,
    Losses,
    StepEnd,
)
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.publisher import Publisher

IDENTITY = Envelope(run_id="run", incarnation="one", rank=3)


class Trainer:
    """A publisher, and the lines that it showed."""

    def __init__(self, address: str, **settings: Any) -> None:
        self.lines: list[str] = []
        settings.setdefault("console", Console(self.lines.append))
        self.publisher = Publisher(address, IDENTITY, Hello(project="p"), **settings).start()

    def accepted(self) -> int:
        return sum(account.accepted for account in self.publisher.accounts().values())

    def produced(self, kind: Kind) -> int:
        account = self.publisher.accounts().get(kind)
        return account.produced if account is not None else 0

    def wait_for_the_end(self) -> None:
        """Return when the thread has ended, which ``close`` does not wait for beyond its time."""
        thread = self.publisher._thread
        assert thread is not None
        thread.join(20)
        assert not thread.is_alive(), "the thread ends with close"

    def assert_exact(self) -> None:
        for account in self.publisher.accounts().values():
            assert account.produced == account.accepted + account.refused + account.dropped + account.in_window


def losses(step: int, num_tokens: int = 4) -> Losses:
    return Losses(step=step, microstep=0, labelled=num_tokens, losses=np.full(num_tokens, step, np.float32))


def generation(step: int, num_ids: int = 4) -> Generation:
    ids = np.zeros(num_ids, np.int32)
    return Generation(step=step, samples=ids[:1], offsets=np.array([0, num_ids], np.int64), ids=ids)


def end(step: int, **sent: int) -> StepEnd:
    return StepEnd(step=step, unix_time=0.0, sent=sent)
