"""The publisher in real processes: forked children, an interpreter that ends, a worker that is launched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest

from sidestep.protocol.messages import Goodbye, Losses
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.launcher import place_worker, start_worker

if TYPE_CHECKING:
    from tests.integration.publisher.conftest import RouterWorker

MakeWorker: TypeAlias = "Callable[..., RouterWorker]"
Eventually: TypeAlias = Callable[[Callable[[], object]], None]

_START = """
import os, sys, time, warnings
warnings.filterwarnings("ignore", category=DeprecationWarning)  # forking beside a thread is what this is about
import numpy as np
from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import Hello, Losses
from sidestep.trainer_hooks.publisher import Publisher

publisher = Publisher(sys.argv[1], Envelope(run_id="run", incarnation="one", rank=0), Hello()).start()

def submit(step):
    publisher.submit(Losses(step=step, microstep=0, labelled=1, losses=np.ones(500, np.float32)))
"""

_FORKS = (
    _START
    + """
for step in range(30):
    submit(step)
    child = os.fork()
    if child == 0:
        submit(10_000 + step)                  # a child inherits the hooks and may call them
        assert not publisher._submissions, "nobody would ever take them"
        publisher.close(5)
        print("from the child", file=sys.stderr, flush=True)
        sys.exit(0)                            # runs the interpreter's own clean-up, sockets and contexts included
    assert os.waitpid(child, 0)[1] == 0
    time.sleep(0.007)                          # another phase of the tick each time
publisher.close(10)
print("accepted", sum(account.accepted for account in publisher.accounts().values()))
"""
)

_LOADER = (
    _START
    + """
import torch

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        submit(20_000 + index)
        return index

if __name__ == "__main__":
    torch.set_num_threads(1)
    seen = 0
    for epoch in range(3):
        loader = torch.utils.data.DataLoader(Numbers(), batch_size=8, num_workers=2, multiprocessing_context="fork")
        for batch in loader:
            submit(seen)
            seen += 1
    publisher.close(10)
    print("accepted", sum(account.accepted for account in publisher.accounts().values()))
"""
)

_ENDS_WITHOUT_CLOSE = (
    _START
    + """
for step in range(5):
    submit(step)
if sys.argv[2] == "with a worker":
    while sum(account.accepted for account in publisher.accounts().values()) < 5:
        time.sleep(0.005)
else:
    time.sleep(0.3)
"""
)


def run_trainer(script: str, *arguments: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "trainer.py"
    file.write_text(script)
    return subprocess.run(
        [sys.executable, "-X", "dev", str(file), *arguments], capture_output=True, text=True, timeout=50, check=False
    )


@pytest.mark.parametrize(("script", "expected"), [(_FORKS, (31, 30)), (_LOADER, (25, 0))])
def test_children_never_touch_the_socket_and_the_parent_loses_nothing(
    address: str, make_worker: MakeWorker, tmp_path: Path, script: str, expected: tuple[int, int]
) -> None:
    num_messages, num_child_lines = expected
    worker = make_worker().start()
    done = run_trainer(script, address, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"accepted {num_messages}\n"
    assert done.stderr.splitlines() == ["from the child"] * num_child_lines
    assert worker.arrivals == list(range(1, num_messages + 1))
    assert worker.num_peers == 1
    steps = [message.step for message in worker.stored.values() if isinstance(message, Losses)]
    assert steps == list(range(num_messages - 1))
    assert isinstance(worker.stored[num_messages], Goodbye)


@pytest.mark.parametrize("with_worker", [False, True])
def test_a_trainer_that_forgets_to_close_ends_all_the_same(
    address: str, make_worker: MakeWorker, tmp_path: Path, with_worker: bool
) -> None:
    worker = make_worker()
    if with_worker:
        worker.start()
    done = run_trainer(_ENDS_WITHOUT_CLOSE, address, "with a worker" if with_worker else "alone", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(worker.arrivals) == (5 if with_worker else 0)


def test_a_killed_trainer_leaves_all_but_the_last_tick_with_the_worker(
    address: str, make_worker: MakeWorker, tmp_path: Path
) -> None:
    worker = make_worker().start()
    file = tmp_path / "trainer.py"
    file.write_text(_START + "step = 0\nwhile True:\n    submit(step)\n    step += 1\n    time.sleep(0.005)\n")
    process = subprocess.Popen([sys.executable, str(file), address])
    try:
        deadline = time.monotonic() + 30
        while len(worker.arrivals) < 50:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait(10)
    arrivals = list(worker.arrivals)  # more may still come in
    assert arrivals == list(range(1, len(arrivals) + 1)), "no hole before the end"


def test_an_endpoint_that_is_named_starts_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    environment = {"SIDESTEP_ENDPOINT": "tcp://127.0.0.1:5555", "SIDESTEP_HOME": str(tmp_path)}
    console = Console(lines.append)
    named = place_worker(None, rank=0, environment=environment, console=console)
    given = place_worker("ipc:///tmp/x", rank=0, environment=environment, console=console)
    other = place_worker(None, rank=3, environment={"SIDESTEP_RUNTIME": str(tmp_path)}, console=console)
    assert [each.endpoint for each in (named, given)] == ["tcp://127.0.0.1:5555", "ipc:///tmp/x"]
    assert other.endpoint == f"ipc://{tmp_path}/worker.sock"
    assert not any(each.is_to_start or each.pid is not None for each in (named, given, other))
    assert lines == []
    assert list(tmp_path.iterdir()) == []


def test_rank_0_starts_a_worker_in_a_session_of_its_own(tmp_path: Path, eventually: Eventually) -> None:
    lines: list[str] = []
    environment = {
        **os.environ,
        "SIDESTEP_HOME": str(tmp_path / "home"),
        "SIDESTEP_RUNTIME": str(tmp_path / "sockets"),
        "RANK": "0",
    }
    console = Console(lines.append)
    placed = place_worker(None, rank=0, environment=environment, console=console)
    assert placed.is_to_start
    launched = start_worker(placed, environment=environment, console=console)
    assert launched.pid is not None
    try:
        arguments = Path(f"/proc/{launched.pid}/cmdline")
        eventually(arguments.read_bytes)  # empty while the new program is being loaded
        command = arguments.read_bytes().split(b"\0")
        assert os.getsid(launched.pid) == launched.pid
        assert os.getpgid(launched.pid) != os.getpgid(0)
        assert launched.journal is not None
        assert launched.journal.parent.parent == tmp_path / "home" / "runs"
        assert (launched.journal.parent / "worker.log").exists()
        assert b"--owner-pid" in command
        assert str(os.getpid()).encode() in command
    finally:
        os.kill(launched.pid, signal.SIGKILL)
        os.waitpid(launched.pid, 0)
    assert len(lines) == 1
    assert str(launched.journal.parent) in lines[0]
    assert "W&B offline" in lines[0]
