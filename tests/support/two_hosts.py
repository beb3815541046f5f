"""A worker on one host and publishers on another, with keys: what the tests and benchmarks/two_hosts.py cut apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.support.namespaces import TRAINER, WORKER, TwoHosts
from tests.support.rank_process import RankProcess
from tests.support.run_balance import check_balance
from tests.support.worker_process import WorkerProcess, wait_until

PORT: Final = 5757
_STEPS_A_TURN: Final = 5
_TURN_SECONDS: Final = 0.1

CUTS: dict[str, tuple[Callable[[TwoHosts], None], Callable[[TwoHosts], None]]] = {
    "packets vanish": (lambda hosts: hosts.drop(), lambda hosts: hosts.pass_again()),
    "the worker's cable": (lambda hosts: hosts.link(WORKER, up=False), lambda hosts: hosts.link(WORKER, up=True)),
    "the trainer's cable": (lambda hosts: hosts.link(TRAINER, up=False), lambda hosts: hosts.link(TRAINER, up=True)),
}


class Scene:
    """The worker's process on one host, and publishers on the other."""

    def __init__(self, hosts: TwoHosts, keys: Path) -> None:
        self.hosts = hosts
        self.worker = WorkerProcess("--keys", str(keys), "--assembly-deadline-seconds", "40")
        self.worker.address = f"tcp://{hosts.addresses[WORKER]}:{PORT}"
        self.worker.prefix = hosts.at(WORKER)
        self.worker.start()
        self._keys = keys
        self._next_step = 0

    def rank(self, **environment: str) -> RankProcess:
        return RankProcess(
            self.worker.address,
            prefix=self.hosts.at(TRAINER),
            environment={"SIDESTEP_KEYS": str(self._keys), **environment},
        )

    def train(self, rank: RankProcess, seconds: float) -> None:
        """Hand steps over for so long, whatever becomes of them."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            rank.steps(self._next_step, self._next_step + _STEPS_A_TURN)
            self._next_step += _STEPS_A_TURN
            time.sleep(_TURN_SECONDS)

    def steps(self) -> list[int]:
        return list(range(self._next_step))

    def closed(self) -> list[int]:
        """The steps that have closed; what a goodbye told after the last one is not a step."""
        return [step for _, step, reason in self.worker.closed_steps() if reason != "tail"]

    def finish(self, rank: RankProcess, out: Path) -> None:
        """Say goodbye; the journal then holds everything once, and its replay is the same bytes."""
        rank.close()
        wait_until(lambda: self.worker.query("SELECT attempt FROM ending"), "the run has ended", 60.0)
        assert self.worker.terminate() == 0
        assert self.worker.query("SELECT tail_unknown, exit_code FROM ending") == [(0, 0)]
        check_balance(self.worker.journal, out)
