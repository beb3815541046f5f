"""docs/own_detector.md as it stands: its code in a package of its own, a real training, a real worker, a replay."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.worker_process import WorkerProcess, wait_until
from torch import nn

import sidestep

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "own_detector.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LINE = next(line for line in CODE if line.startswith("hooks.log"))
DETECTOR = next(code for code in CODE if "class RouterCollapse" in code)
COLLAPSE_AT, STEPS = 12, 20


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    package = tmp_path / "my_lab"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "detectors.py").write_text(DETECTOR)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    made = WorkerProcess("--detector", "my_lab.detectors:RouterCollapse")
    yield made
    made.remove()


def train(address: str) -> None:
    """A training whose router collapses, with the page's own line in its loop."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = sidestep.attach(model, optimizer, endpoint=address, run_id="router")
    for step in range(STEPS):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        router_entropy = torch.tensor(0.05 if step >= COLLAPSE_AT else 1.3)
        exec(LINE, {"hooks": hooks, "router_entropy": router_entropy})  # noqa: S102  (the page's line, as it stands)
        hooks.after_step(step)
    hooks.close()


def test_the_page_is_short_and_does_what_it_says(worker: WorkerProcess) -> None:
    assert len([line for line in DETECTOR.splitlines() if line.strip()]) <= 25
    worker.start()
    train(worker.address)
    wait_until(lambda: any(kind == "finish" for kind, _ in worker.outbox()), "the run ends")
    entries = worker.outbox()
    rows: list[dict[str, Any]] = [payload for kind, payload in entries if kind == "row"]
    assert [row["train/step"] for row in rows if row.get("incidents/router_collapse") == 1] == [COLLAPSE_AT + 2]
    (alert,) = [payload for kind, payload in entries if kind == "alert"]
    assert alert["level"] == "critical"
    assert "the router sends everything to one expert" in alert["text"]
    assert "the router's entropy is 0.05 nats" in alert["text"]
    assert "router_collapse" in worker.text()
    assert worker.terminate() == 0
    replayed = worker.run("replay", str(worker.journal), "--out", str(worker.folder / "again"))
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr


def test_a_detector_that_cannot_be_loaded_is_named_before_anything_starts(tmp_path: Path) -> None:
    places = ["--endpoint", f"ipc://{tmp_path}/s", "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "-m", "sidestep.worker.cli", "worker", *places, "--detector", "my_lab.nothing:Here"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, "SIDESTEP_HOME": str(tmp_path / "home")},
    )
    assert ended.returncode == 2
    assert "--detector my_lab.nothing:Here" in ended.stderr
    assert "Traceback" not in ended.stderr
