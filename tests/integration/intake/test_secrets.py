"""The W&B key is in the worker's environment and nowhere else: no file, answer or command line of it has the key."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.wandb_backend import Fault, WandbBackend
from tests.support.wire_trainer import WireTrainer
from tests.support.worker_process import WorkerProcess, wait_until

KEY = "c0ffee5ec2e7" + "0123456789ab" * 2 + "beef"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    """A worker whose W&B refuses once, so that it also has something to complain of."""
    with WandbBackend() as backend:
        for name, value in {**backend.environment, "WANDB_API_KEY": KEY}.items():
            monkeypatch.setenv(name, value)
        backend.faults["graphql"] = Fault(status=403, requests=2)
        made = WorkerProcess(wandb_mode="online")
        made.start()
        try:
            yield made
        finally:
            made.remove()


def descendants(pid: int) -> set[int]:
    """Return the processes that ``pid`` has started, and theirs."""
    found: set[int] = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text(encoding="ascii").split()):
            found |= {child} | descendants(child)
    return found


def test_no_file_answer_or_command_line_of_a_worker_has_the_key(worker: WorkerProcess) -> None:
    assert worker.process is not None
    with WireTrainer(worker.address) as trainer:
        trainer.greet()
        trainer.wait_for_acks(trainer.send_step(0))
        wait_until(lambda: descendants(worker.process.pid if worker.process else 0), "W&B's process has started")
        lines = [
            Path(f"/proc/{pid}/cmdline").read_bytes() for pid in [worker.process.pid, *descendants(worker.process.pid)]
        ]
        assert not any(KEY.encode() in line for line in lines)
        assert KEY.encode() in Path(f"/proc/{worker.process.pid}/environ").read_bytes(), "the worker does have it"
        address = json.loads((worker.journal / "worker.json").read_text(encoding="utf-8"))["health_url"]
        with urllib.request.urlopen(address, timeout=10) as answer:  # noqa: S310  (its own loopback address)
            assert KEY not in answer.read().decode()
        shown = worker.run("status", "--json")
        assert KEY not in shown.stdout + shown.stderr
        trainer.wait_for_acks([trainer.goodbye(0)])
        assert not any(KEY in repr(message) for message in trainer.heard)
    worker.terminate()
    files = [path for path in worker.folder.rglob("*") if path.is_file()]
    assert {"index.sqlite", "worker.log"} <= {path.name for path in files}
    assert [str(path) for path in files if KEY.encode() in path.read_bytes()] == []
    assert os.environ["WANDB_API_KEY"] == KEY
