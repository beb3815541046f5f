"""torchrun's agents as processes of a test: started side by side, looked at as they run, ended with all theirs."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.rank_processes import ROOT, kill_tree

_MARK = "SIDESTEP_TEST_TREE"
PATIENCE_SECONDS = 100.0
"""On a busy machine torch alone takes half a minute to be loaded."""
AGENT = (sys.executable, "-m", "torch.distributed.run")
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}
"""Each start of the ranks meets in a store of its own: in the agents', gloo finds addresses of the start before."""


class Launches:
    """Commands that run until the test ends; ``prefix`` runs them elsewhere (``ip netns exec NAME``)."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._mark = uuid.uuid4().hex
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {_MARK: self._mark, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self._environment = {**os.environ, **OWN_STORE, **own, **environment}
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the launches)
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        """Start one."""
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT,
            env={**self._environment, **environment},
        )  # fmt: skip
        self._started.append(process)
        return process

    def said(self) -> str:
        """Return all that they have said so far."""
        return os.pread(self._output.fileno(), 1 << 24, 0).decode("utf-8", errors="replace")

    def until(self, condition: Callable[[], object], what: str, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """Return when ``condition`` holds; else the test fails, with all that was said."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            failed = [process.args for process in self._started if process.poll()]
            assert not failed, f"{what}: {failed} ended before\n{self.said()[-12_000:]}"
            assert time.monotonic() < deadline, f"{what}: not within {timeout_seconds} s\n{self.said()[-12_000:]}"
            time.sleep(0.05)

    def wait(self, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """Wait for the end of all, which has to be a good one."""
        for process in self._started:
            try:
                code = process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                code = None
            assert code == 0, f"{process.args!r} ended with {code}\n{self.said()[-12_000:]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kill_tree(self._mark)
        for process in self._started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
        self._output.close()


class RankLog:
    """What one process of ``elastic_training.py`` has written."""

    def __init__(self, file: Path | None) -> None:
        rank, pid, _ = ("-1", "0", "") if file is None else file.name.split(".")
        self.rank, self.pid = int(rank), int(pid)
        text = "" if file is None else file.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        self.head: dict[str, Any] = next((line for line in lines if "world" in line), {})
        self.steps: list[dict[str, Any]] = [line for line in lines if "step" in line]
        self.has_ended = any("failures" in line for line in lines)
        self.failures: dict[str, int] = next((line["failures"] for line in lines if "failures" in line), {})

    @classmethod
    def none(cls) -> Self:
        """Return the log of a process that there is not yet."""
        return cls(None)


def rank_logs(out: Path) -> list[RankLog]:
    """Return the logs of all processes so far, the oldest first."""
    return [RankLog(file) for file in sorted(out.glob("*.jsonl"), key=lambda file: file.stat().st_mtime)]


def query(journal: Path, text: str) -> list[tuple[Any, ...]]:
    """Read a journal's index; nothing where it is not made yet."""
    if not (journal / "index.sqlite").exists():
        return []
    with closing(sqlite3.connect(f"file:{journal / 'index.sqlite'}?mode=ro", uri=True, timeout=10)) as connection:
        try:
            return connection.execute(text).fetchall()
        except sqlite3.OperationalError:  # it is only being made
            return []
