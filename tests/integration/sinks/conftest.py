"""Child processes of the W&B sink, run to their end or watched."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.outbox_writing import OutboxWriter
from tests.support.wandb_backend import WandbBackend
from tests.support.wandb_supervising import sink_processes

from sidestep.worker.sinks.wandb_supervisor import WandbSinkConfig, WandbSupervisor


@dataclass(frozen=True, kw_only=True)
class SinkResult:
    """How a child ended."""

    exit_code: int
    reports: list[dict[str, Any]]
    log: str

    @property
    def last(self) -> dict[str, Any]:
        return self.reports[-1]


RunSink = Callable[..., SinkResult]
Supervise = Callable[..., WandbSupervisor]


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[OutboxWriter]:
    writer = OutboxWriter(tmp_path / "journal")
    yield writer
    writer.close()


def sink_command(outbox: OutboxWriter, out: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "sidestep.worker.sinks.wandb_sink",
        "--journal", str(outbox.folder), "--run", outbox.run_id, "--out", str(out), *options,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def run_sink() -> RunSink:
    """Run a child to its end."""

    def run(outbox: OutboxWriter, out: Path, *options: str, env: Mapping[str, str] | None = None) -> SinkResult:
        command = sink_command(outbox, out, *options)
        done = subprocess.run(command, check=False, capture_output=True, timeout=50, env=env)
        log = done.stderr.decode()
        assert done.stdout, log
        reports = [json.loads(line) for line in done.stdout.splitlines()]
        return SinkResult(exit_code=done.returncode, reports=reports, log=log)

    return run


@pytest.fixture
def supervise(outbox: OutboxWriter, tmp_path: Path) -> Iterator[Supervise]:
    """Make supervisors that leave no process behind."""
    made: list[WandbSupervisor] = []

    def make(backend: WandbBackend | None = None, **settings: Any) -> WandbSupervisor:
        config: dict[str, Any] = {
            "journal": outbox.folder, "run_id": outbox.run_id, "out": tmp_path / "out", "backoff_first_seconds": 0.05,
            "mode": "offline" if backend is None else "online", "environment": backend.environment if backend else {},
            "rows_per_second": 0.0,
        }  # fmt: skip
        made.append(WandbSupervisor(WandbSinkConfig(**{**config, **settings})))
        return made[-1]

    yield make
    for supervisor in made:
        supervisor.stop(0.0)
    deadline = time.monotonic() + 10
    while left := sink_processes(tmp_path):
        assert time.monotonic() < deadline, f"processes are left: {left}"
        time.sleep(0.02)


@pytest.fixture
def backend() -> Iterator[WandbBackend]:
    with WandbBackend() as made:
        yield made
